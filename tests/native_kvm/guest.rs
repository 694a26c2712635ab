// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that stores, loads and asks for conversions as its registers say.

use crate::kvm::{Exit, Machine, Regs, Vcpu, KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED};
use gmem::{Attribute, Block};
use std::arch::x86_64::__cpuid;
use std::io;
use std::sync::Arc;

const PAGE: u64 = 4096;
const CODE: u64 = 0x1000;
/// mov [bx],ax; hlt
const STORE: (u64, [u8; 3]) = (CODE, [0x89, 0x07, 0xf4]);
/// mov ax,[bx]; hlt
pub const LOAD: (u64, [u8; 3]) = (CODE + 0x10, [0x8b, 0x07, 0xf4]);
/// vmmcall or vmcall; hlt
const CALL: u64 = CODE + 0x20;

fn call_instruction() -> [u8; 4] {
    // SAFETY: every x86-64 CPU has leaf 0.
    #[allow(unused_unsafe)]
    let vendor = unsafe { __cpuid(0) };
    match &vendor.ebx.to_le_bytes() {
        b"Genu" => [0x0f, 0x01, 0xc1, 0xf4],
        _ => [0x0f, 0x01, 0xd9, 0xf4],
    }
}

/// A confidential VM whose memory is one block, and a guest that does what its registers say.
pub struct Guest {
    pub machine: Machine,
    pub block: Arc<Block>,
    pub vcpu: Vcpu,
}

impl Guest {
    /// The whole block at address 0; its first pages are shared and hold the guest's code.
    pub fn on(machine: Machine, block: Arc<Block>) -> Self {
        let size = block.span().end();
        Self::shown(machine, block, &[(0, 0, size)])
    }

    /// At some address each, so many bytes from some offset. The guest's code is at the first offsets,
    /// and it reaches the first 64 KiB of addresses.
    pub fn shown(machine: Machine, block: Arc<Block>, parts: &[(u64, u64, u64)]) -> Self {
        machine.exit_on_hypercalls();
        for (number, &(gpa, offset, size)) in parts.iter().enumerate() {
            let slot = block.memslot(offset).unwrap();
            machine.add_slot(number as u32, gpa, size, &slot).unwrap();
            block.bind(offset, size, gpa).unwrap().keep();
        }
        let vcpu = machine.add_vcpu();
        let guest = Self {
            machine,
            block,
            vcpu,
        };
        guest.host_writes(STORE.0, &STORE.1);
        guest.host_writes(LOAD.0, &LOAD.1);
        guest.host_writes(CALL, &call_instruction());
        guest
    }

    pub fn host_writes(&self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.block.span().end());
        // SAFETY: within the mapping, and the vCPU doesn't run.
        unsafe {
            let host = self.block.host().add(offset as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len());
        }
    }

    pub fn host_reads(&self, offset: u64) -> u16 {
        assert!(offset + 2 <= self.block.span().end());
        // SAFETY: within the mapping, and the vCPU doesn't run.
        unsafe { self.block.host().add(offset as usize).cast::<u16>().read() }
    }

    pub fn stores(&self, gpa: u64, value: u16) {
        let exit = self.vcpu.start(Regs {
            rip: STORE.0,
            rbx: gpa,
            rax: value.into(),
            ..Default::default()
        });
        assert_eq!(exit, Exit::Halt);
    }

    pub fn loads(&self, gpa: u64) -> u16 {
        self.try_to_load(gpa).unwrap()
    }

    /// The error of KVM_RUN if there is one.
    pub fn try_to_load(&self, gpa: u64) -> io::Result<u16> {
        self.vcpu.set(Regs {
            rip: LOAD.0,
            rbx: gpa,
            ..Default::default()
        });
        assert_eq!(self.vcpu.try_to_go_on()?, Exit::Halt);
        Ok(self.vcpu.regs().rax as u16)
    }

    /// The guest asks for a conversion, the host does it, the guest gets the answer.
    pub fn asks(&self, gpa: u64, size: u64, attribute: Attribute) -> u64 {
        let wanted = match attribute {
            Attribute::Shared => 0,
            Attribute::Private => KVM_MAP_GPA_RANGE_ENCRYPTED,
        };
        let exit = self.vcpu.start(Regs {
            rip: CALL,
            rax: KVM_HC_MAP_GPA_RANGE,
            rbx: gpa,
            rcx: size / PAGE,
            rdx: wanted,
            ..Default::default()
        });
        let call = Exit::Hypercall {
            number: KVM_HC_MAP_GPA_RANGE,
            arguments: [gpa, size / PAGE, wanted],
        };
        assert_eq!(exit, call);
        let result = self.machine.vm.convert(gpa, size, attribute);
        let errno = result.map_or_else(|error| -error.errno(), |()| 0);
        self.vcpu
            .answer(gmem::capi::gmem_hypercall_result(errno, 0));
        assert_eq!(self.vcpu.go_on(), Exit::Halt);
        self.vcpu.regs().rax
    }
}
