// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel of this VM can do: asked, never assumed from a version.

use super::abi::*;
use super::{CallError, CallResult, Kernel};
use crate::error::{Doing, Error, Result};
use std::os::fd::BorrowedFd;

/// Answers of one VM. They depend on the VM's type, so the VM is asked and not /dev/kvm
/// (kvm_vm_ioctl_check_extension; the system's own answer shows more than a VM has).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// KVM_SET_USER_MEMORY_REGION2.
    pub user_memory2: bool,
    /// KVM_CREATE_GUEST_MEMFD.
    pub guest_memfd: bool,
    /// A guest_memfd can be mapped (Linux 6.18).
    pub guest_memfd_mmap: bool,
    /// A guest_memfd's pages can start shared (Linux 6.18, not for confidential VM types).
    pub guest_memfd_init_shared: bool,
    /// The VM keeps a private attribute per page, set by KVM_SET_MEMORY_ATTRIBUTES.
    pub private_attribute: bool,
    /// Its guest_memfds keep one, set by KVM_SET_MEMORY_ATTRIBUTES2. Then the VM keeps none.
    pub in_place_conversion: bool,
    /// A guest_memfd's memory can be out of the kernel's direct map.
    pub no_direct_map: bool,
    /// A guest_memfd can be filled by write(2).
    pub write_populate: bool,
    /// Of pages of how many bytes a guest_memfd can be, other than 4096, ORed.
    pub huge_page_sizes: u64,
}

impl Probe {
    /// Asks `vm`. ENOTTY for a file that is no KVM VM.
    pub(crate) fn of(kernel: &dyn Kernel, vm: BorrowedFd) -> Result<Self> {
        if !kernel.is_vm(vm) {
            return Err(CallError {
                call: "KVM_CHECK_EXTENSION",
                errno: libc::ENOTTY,
            })
            .doing(|| "the file is not that of a KVM VM".into());
        }
        let ask = |capability| -> CallResult<u64> {
            Ok(kernel.check_extension(vm, capability)?.max(0) as u64)
        };
        let all = || -> CallResult<Self> {
            // Unknown bits are left alone: three kernel series claim bit 2 for three things.
            let flags = ask(KVM_CAP_GUEST_MEMFD_FLAGS)?;
            let attributes = ask(KVM_CAP_MEMORY_ATTRIBUTES)?;
            Ok(Self {
                user_memory2: ask(KVM_CAP_USER_MEMORY2)? != 0,
                guest_memfd: ask(KVM_CAP_GUEST_MEMFD)? != 0,
                guest_memfd_mmap: flags & GUEST_MEMFD_FLAG_MMAP != 0,
                guest_memfd_init_shared: flags & GUEST_MEMFD_FLAG_INIT_SHARED != 0,
                private_attribute: attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE != 0,
                ..Self::default()
            })
        };
        all().doing(|| "asking the VM for its capabilities".into())
    }

    /// Whether a VM's ordinary RAM can be one mapped guest_memfd; if not, what is missing.
    pub(crate) fn require_in_place(&self) -> Result<()> {
        self.require(&[
            (self.user_memory2, "KVM_CAP_USER_MEMORY2"),
            (self.guest_memfd, "KVM_CAP_GUEST_MEMFD"),
            (self.guest_memfd_mmap, "GUEST_MEMFD_FLAG_MMAP (Linux 6.18)"),
            (
                self.guest_memfd_init_shared,
                "GUEST_MEMFD_FLAG_INIT_SHARED (Linux 6.18, ordinary VM types only)",
            ),
        ])
    }

    /// Whether a VM's RAM can be a memfd beside a guest_memfd; if not, what is missing.
    pub(crate) fn require_split(&self) -> Result<()> {
        self.require(&[
            (self.user_memory2, "KVM_CAP_USER_MEMORY2"),
            (self.guest_memfd, "KVM_CAP_GUEST_MEMFD"),
            (
                self.private_attribute,
                "the PRIVATE bit of KVM_CAP_MEMORY_ATTRIBUTES (a confidential VM type, on a kernel \
                 that keeps attributes per VM)",
            ),
        ])
    }

    fn require(&self, wanted: &[(bool, &str)]) -> Result<()> {
        let missing: Vec<&str> = wanted
            .iter()
            .filter(|(have, _)| !have)
            .map(|&(_, name)| name)
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::Unsupported(format!(
            "the kernel lacks, for this VM: {}",
            missing.join(", ")
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let probe = Probe {
            user_memory2: true,
            guest_memfd: true,
            ..Default::default()
        };
        let text = probe.require_in_place().unwrap_err().to_string();
        assert!(text.contains("GUEST_MEMFD_FLAG_MMAP") && text.contains("INIT_SHARED"));
        assert!(!text.contains("KVM_CAP_GUEST_MEMFD,"));
        assert!(probe.require_split().is_err());
    }
}
