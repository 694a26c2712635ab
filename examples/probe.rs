// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this host's kernel offers: asks one VM of each type that the library can serve, and tries a
//! block on it. `RUST_LOG=debug cargo run --example probe` shows the library's own messages too.

use gmem::{Attribute, Block, BlockConfig, Vm};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const TYPES: [(&str, libc::c_ulong); 2] = [("ordinary", 0), ("KVM_X86_SW_PROTECTED_VM", 1)];
const SIZE: u64 = 2 << 20;

fn create_vm(kvm: &File, kind: libc::c_ulong) -> std::io::Result<OwnedFd> {
    // SAFETY: the argument is a number.
    let fd = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, kind) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave this number to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn main() -> std::io::Result<()> {
    env_logger::init();
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    for (name, kind) in TYPES {
        let fd = match create_vm(&kvm, kind) {
            Ok(fd) => fd,
            Err(error) => {
                println!("{name} VM: {error}");
                continue;
            }
        };
        let vm = match Vm::new(&fd) {
            Ok(vm) => vm,
            Err(error) => {
                println!("{name} VM: {error}");
                continue;
            }
        };
        println!("{name} VM: {}", vm.probe());
        println!("  {:?}", vm.probe());
        let ordinary = BlockConfig::new("probe", SIZE);
        let confidential = BlockConfig::confidential("probe", SIZE, Attribute::Shared);
        for (how, config) in [("ordinary", ordinary), ("confidential", confidential)] {
            match Block::new(&vm, &config) {
                Ok(block) => println!("  {how} memory: {}", block.backing()),
                Err(error) => println!("  {how} memory: no: {error}"),
            }
        }
    }
    Ok(())
}
