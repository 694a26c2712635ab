// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's function that conversions in place go through: kernels call it this or that, and one that is there by
//! name may be in no stack, since it was inlined or ends in a jump. So each that could be it is tried.

use crate::failure::{Attempt, Failure};
use crate::host::faults::Faults;
use crate::host::kernel;
use gmem::{Attribute, Block, BlockConfig, Vm, PAGE_SIZE};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_X86_SW_PROTECTED_VM: libc::c_ulong = 1;
const PAGES: u64 = 64;
/// What such a function's name has in it, beside "gmem". The ioctl itself comes last: what is below it is more than the
/// conversion.
const WORDS: [&str; 3] = ["convert", "attributes", "ioctl"];

/// Its name, or the sentence that says why there is none that would do.
pub fn function() -> Result<Result<String, String>, Failure> {
    let symbols =
        fs::read_to_string("/proc/kallsyms").attempt(|| "reading /proc/kallsyms".into())?;
    let candidates = candidates(&symbols);
    let trial = Trial::new()?;
    for name in &candidates {
        if trial.has_in_stack(name)? {
            return Ok(Ok(name.clone()));
        }
    }
    let sentence = format!(
        "no function of this kernel is known to be in the stack of a conversion in place, so its allocations can't be \
         failed: tried {}",
        candidates.join(", ")
    );
    match kernel::is_the_labs() {
        true => Err(Failure::new(sentence)),
        false => Ok(Err(sentence)),
    }
}

/// Functions by name, the likeliest first.
fn candidates(kallsyms: &str) -> Vec<String> {
    let mut names: Vec<(usize, String)> = kallsyms
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let kind = words.nth(1)?;
            let name = words.next()?;
            let rank = WORDS.iter().position(|word| name.contains(word))?;
            let fits = kind.eq_ignore_ascii_case("t") && name.contains("gmem");
            fits.then(|| (rank, name.to_string()))
        })
        .collect();
    names.sort();
    names.dedup();
    names.into_iter().map(|(_, name)| name).collect()
}

/// A VM of our own, to convert in.
struct Trial {
    vm: Arc<Vm>,
    _block: Arc<Block>,
}

impl Trial {
    fn new() -> Result<Self, Failure> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let kvm = kvm.attempt(|| "opening /dev/kvm".into())?;
        // SAFETY: the argument is a number.
        let fd = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM) };
        if fd < 0 {
            let error = std::io::Error::last_os_error();
            return Err(Failure::new(format!("KVM_CREATE_VM: {error}")));
        }
        // SAFETY: the kernel just gave this number to us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let vm = Vm::new(&fd).attempt(|| "a VM to try conversions in".into())?;
        let config = BlockConfig::confidential("trial", PAGES * PAGE_SIZE, Attribute::Shared);
        let block = Block::new(&vm, &config).attempt(|| "memory to convert".into())?;
        let bound = block.bind(0, PAGES * PAGE_SIZE, 0);
        bound.attempt(|| "binding it".into())?.keep();
        Ok(Self { vm, _block: block })
    }

    /// Whether an allocation below it can be failed in a conversion.
    fn has_in_stack(&self, function: &str) -> Result<bool, Failure> {
        let faults = Faults::under(function)?;
        // SAFETY: no memory is passed.
        let thread = unsafe { libc::gettid() } as u32;
        faults.fail_nth(thread, 1)?;
        // Single pages apart from one another: to note them the kernel needs memory, sooner or later.
        for page in (1..PAGES).step_by(2) {
            let _ = self
                .vm
                .convert(page * PAGE_SIZE, PAGE_SIZE, Attribute::Private);
        }
        let failed = faults.failed(thread)?;
        drop(faults);
        self.vm
            .convert(0, PAGES * PAGE_SIZE, Attribute::Shared)
            .attempt(|| "undoing a trial".into())?;
        Ok(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::candidates;

    #[test]
    fn the_likeliest_comes_first_and_data_is_no_function() {
        let text = "1 t kvm_gmem_ioctl\n2 t __kvm_gmem_set_attributes\n3 d kvm_gmem_convert_x\n\
            4 t kvm_gmem_convert\n5 t kvm_gmem_fault\n6 T kvm_set_attributes\n";
        assert_eq!(
            candidates(text),
            [
                "kvm_gmem_convert",
                "__kvm_gmem_set_attributes",
                "kvm_gmem_ioctl"
            ]
        );
    }
}
