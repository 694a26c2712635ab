// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel of this VM can do: asked or tried, never assumed from a version.
//!
//! What is on its way into the kernel has no settled numbers: the capability of conversion in place
//! was renumbered between versions of its series, and flag bit 2 of KVM_CREATE_GUEST_MEMFD is claimed
//! by three series for three things. So these are tried, on files of this VM that end at once.

use super::abi::*;
use super::abi_coming::GUEST_MEMFD_FLAG_CONTESTED;
use super::{CallError, CallResult, Kernel};
use crate::attributes::Attribute;
use crate::error::{Doing, Error, Result};
use crate::plane::{readable, Converting, Patience};
use crate::stats::BlockCounters;
use crate::units::{Offset, Span, PAGE_SIZE};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Orders of the huge pages that a guest_memfd may have: 2 MiB and 1 GiB, those of x86.
const HUGE_PAGE_ORDERS: [u8; 2] = [9, 18];

fn is_switched_off() -> Error {
    Error::unsupported(
        "this kernel keeps no private memory for a VM while conversion in place is switched off",
    )
    .with_remedy(
        "boot it with kvm.gmem_in_place_conversion=1, or load the module kvm with \
         gmem_in_place_conversion=1",
    )
}

/// What the kernel can do for a VM. Answers depend on the VM's type, so the VM is asked and not
/// /dev/kvm.
///
/// # In Rust
/// kvm_vm_ioctl_check_extension; the system's own answer shows more than a VM has.
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
    /// The VM keeps a private attribute per page, set by KVM_SET_MEMORY_ATTRIBUTES (to Linux 7.3).
    pub private_attribute: bool,
    /// The VM's guest_memfds keep a private attribute per page, set by KVM_SET_MEMORY_ATTRIBUTES2,
    /// and pages are converted in place. Then the VM keeps none. A VM can have private memory if it
    /// has this or [`Probe::private_attribute`].
    pub in_place_conversion: bool,
    /// A guest_memfd's memory can be out of the kernel's direct map. Experimental.
    pub no_direct_map: bool,
    /// A guest_memfd can be filled by write(2).
    pub write_populate: bool,
    /// Of pages of how many bytes a guest_memfd can be, other than 4096, ORed: 2 MiB, 1 GiB; 0:
    /// none. The host's pool of them may be empty.
    pub huge_page_sizes: u64,
    /// The kernel has flag bit 2, whatever it means there.
    contested_flag: bool,
    /// There is no private memory for this VM of a confidential type, and there would be if the kernel
    /// had not been told to convert nothing in place.
    switched_off: bool,
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
            let flags = ask(KVM_CAP_GUEST_MEMFD_FLAGS)?;
            let attributes = ask(KVM_CAP_MEMORY_ATTRIBUTES)?;
            Ok(Self {
                user_memory2: ask(KVM_CAP_USER_MEMORY2)? != 0,
                guest_memfd: ask(KVM_CAP_GUEST_MEMFD)? != 0,
                guest_memfd_mmap: flags & GUEST_MEMFD_FLAG_MMAP != 0,
                guest_memfd_init_shared: flags & GUEST_MEMFD_FLAG_INIT_SHARED != 0,
                private_attribute: attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE != 0,
                contested_flag: flags & GUEST_MEMFD_FLAG_CONTESTED != 0,
                ..Self::default()
            })
        };
        let mut probe = all().doing(|| "asking the VM for its capabilities".into())?;
        // What a kernel that knows of shared pages in guest_memfds denies to confidential VM types.
        let confidential = probe.guest_memfd_mmap && !probe.guest_memfd_init_shared;
        probe.switched_off =
            confidential && !probe.private_attribute && kernel.in_place_is_switched_off();
        let trial = Trial { kernel, vm };
        let mut tried = || -> CallResult<()> {
            if probe.guest_memfd {
                probe.in_place_conversion = trial.converts_in_place()?;
            }
            if probe.guest_memfd && probe.contested_flag {
                trial.find_meaning(&mut probe)?;
            }
            Ok(())
        };
        tried().doing(|| "trying what the VM's guest_memfds can do".into())?;
        Ok(probe)
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

    /// Whether a VM's RAM can be one mapped guest_memfd whose pages convert where they are; if not,
    /// what is missing.
    pub(crate) fn require_conversion(&self) -> Result<()> {
        if self.switched_off {
            return Err(is_switched_off());
        }
        self.require(&[(
            self.in_place_conversion,
            "KVM_SET_MEMORY_ATTRIBUTES2 (Linux 7.4 at the earliest, the module parameter \
             kvm.gmem_in_place_conversion, and a confidential VM type)",
        )])?;
        self.require_in_place()
    }

    /// Whether a VM's RAM can be a memfd beside a guest_memfd; if not, what is missing.
    pub(crate) fn require_split(&self) -> Result<()> {
        if self.switched_off {
            return Err(is_switched_off());
        }
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
        let missing = missing.join(", ");
        Err(Error::unsupported(format!(
            "the kernel lacks, for this VM: {missing}"
        )))
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.guest_memfd {
            return f.write_str("no guest_memfd");
        }
        let private = match (self.in_place_conversion, self.private_attribute) {
            (true, _) => "private pages, converted in place",
            (false, true) => "private pages by attributes of the VM",
            (false, false) if self.switched_off => {
                "no private pages while kvm.gmem_in_place_conversion is off"
            }
            (false, false) => "no private pages",
        };
        write!(f, "{private}; guest_memfd")?;
        let abilities = [
            (self.guest_memfd_mmap, "mapped"),
            (self.guest_memfd_init_shared, "shared at first"),
            (self.write_populate, "filled by write(2)"),
            (self.no_direct_map, "out of the direct map"),
        ];
        let sizes = HUGE_PAGE_ORDERS
            .map(|order| PAGE_SIZE << order)
            .into_iter()
            .filter(|size| self.huge_page_sizes & size != 0)
            .map(|size| format!("of huge pages of {}", readable(size)));
        let able: Vec<String> = abilities
            .into_iter()
            .filter(|(able, _)| *able)
            .map(|(_, name)| name.to_string())
            .chain(sizes)
            .collect();
        match able.is_empty() {
            true => f.write_str(" without mapping")?,
            false => write!(f, " can be {}", able.join(", "))?,
        }
        let known = self.write_populate || self.no_direct_map || self.huge_page_sizes != 0;
        if self.contested_flag && !known {
            f.write_str("; flag bit 2 means nothing that this version knows, and stays unused")?;
        }
        Ok(())
    }
}

/// Tries things on files that end at once.
struct Trial<'a> {
    kernel: &'a dyn Kernel,
    vm: BorrowedFd<'a>,
}

impl Trial<'_> {
    fn create(&self, size: u64, flags: u64, page_order: u8) -> CallResult<OwnedFd> {
        self.kernel
            .create_guest_memfd(self.vm, size, flags, page_order)
    }

    /// Makes a page private that is: where that can be done nothing happens.
    fn converts_in_place(&self) -> CallResult<bool> {
        let file = self.create(PAGE_SIZE, 0, 0)?;
        let page: Span<Offset> = Span::between(0, PAGE_SIZE);
        let converting = Converting {
            kernel: self.kernel,
            file: file.as_fd(),
            huge_page: None,
        };
        let counters = BlockCounters::default();
        let patience = &mut Patience::default();
        let made = converting.convert(page, Attribute::Private, patience, &counters);
        match made.map_err(|halted| halted.stopped.call) {
            Ok(()) => Ok(true),
            // There is no such ioctl, or it is off; or this VM's type has no private memory.
            Err(call) if [libc::ENOTTY, libc::EINVAL].contains(&call.errno) => Ok(false),
            Err(call) => Err(call),
        }
    }

    /// Finds out what flag bit 2 is for.
    fn find_meaning(&self, probe: &mut Probe) -> CallResult<()> {
        const FLAG: u64 = GUEST_MEMFD_FLAG_CONTESTED;
        match self.create(PAGE_SIZE, FLAG, 0) {
            // Huge pages have an order.
            Err(call) if call.errno == libc::EINVAL => {
                for order in HUGE_PAGE_ORDERS {
                    if self.has_huge_pages(order)? {
                        probe.huge_page_sizes |= PAGE_SIZE << order;
                    }
                }
                return Ok(());
            }
            Err(call) => return Err(call),
            Ok(_file) => {}
        }
        // What it is for shows in a page that the host may touch.
        if !(probe.guest_memfd_mmap && probe.guest_memfd_init_shared) {
            return Ok(());
        }
        let shared = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
        let with = match self.create(PAGE_SIZE, shared | FLAG, 0) {
            Err(call) if call.errno == libc::EINVAL => return Ok(()),
            created => created?,
        };
        if self.kernel.write_page(with.as_fd()).is_ok() {
            probe.write_populate = true;
            return Ok(());
        }
        let without = self.create(PAGE_SIZE, shared, 0)?;
        probe.no_direct_map = self.can_be_held(&without)? && !self.can_be_held(&with)?;
        Ok(())
    }

    fn has_huge_pages(&self, order: u8) -> CallResult<bool> {
        let size = PAGE_SIZE << order;
        match self.create(size, GUEST_MEMFD_FLAG_CONTESTED, order) {
            Ok(file) => Ok(self.kernel.page_size(file.as_fd())? == size),
            Err(call) if call.errno == libc::EINVAL => Ok(false),
            // All of a file is set aside when it is created: the pool is there, and empty.
            Err(call) if call.errno == libc::ENOMEM => Ok(true),
            Err(call) => Err(call),
        }
    }

    /// Whether the kernel lets others refer to a file's pages: what is out of its direct map it does
    /// not (check_vma_flags, as for secretmem).
    fn can_be_held(&self, file: &OwnedFd) -> CallResult<bool> {
        let mapping = self.kernel.map(file.as_fd(), PAGE_SIZE, PAGE_SIZE)?;
        match self.kernel.refer(&mapping) {
            Ok(()) => Ok(true),
            Err(call) if call.errno == libc::EFAULT => Ok(false),
            Err(call) => Err(call),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::fake::{Contested, Failures, FakeKernel, VmKind};

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
    fn found(kernel: &FakeKernel) -> Result<Probe> {
        let vm = std::fs::File::open("/dev/null").unwrap();
        Probe::of(kernel, vm.as_fd())
    }

    const KINDS: [VmKind; 5] = [
        VmKind::Ordinary,
        VmKind::Confidential,
        VmKind::InPlace,
        VmKind::SwitchedOff,
        VmKind::Old,
    ];

    #[test]
    fn every_kernel_is_found_out() {
        let words = KINDS.map(|kind| found(&FakeKernel::new(kind)).unwrap().to_string());
        assert_eq!(
            words,
            [
                "no private pages; guest_memfd can be mapped, shared at first",
                "private pages by attributes of the VM; guest_memfd can be mapped",
                "private pages, converted in place; guest_memfd can be mapped, shared at first, of \
                 huge pages of 2 MiB, of huge pages of 1 GiB",
                "no private pages while kvm.gmem_in_place_conversion is off; guest_memfd can be mapped",
                "no guest_memfd",
            ]
        );
    }

    #[test]
    fn a_switch_that_is_off_is_named_as_the_cure() {
        let off = found(&FakeKernel::new(VmKind::SwitchedOff)).unwrap();
        for refused in [off.require_split(), off.require_conversion()] {
            let text = refused.unwrap_err().to_string();
            assert!(text.contains("kvm.gmem_in_place_conversion=1"), "{text}");
        }
        let confidential = found(&FakeKernel::new(VmKind::Confidential)).unwrap();
        confidential.require_split().unwrap();
        let ordinary = found(&FakeKernel::new(VmKind::Ordinary)).unwrap();
        let text = ordinary.require_split().unwrap_err().to_string();
        assert!(text.contains("PRIVATE bit"), "{text}");
    }

    #[test]
    fn a_vm_whose_type_has_no_private_memory_has_nothing_to_convert() {
        let kernel = FakeKernel::new(VmKind::InPlace);
        let vm = std::fs::File::open("/dev/null").unwrap();
        let trial = Trial {
            kernel: &kernel,
            vm: vm.as_fd(),
        };
        let answer = |errno| {
            let (first, count) = (1, 1);
            kernel.fail(Some(Failures {
                first,
                count,
                errno,
            }));
            trial.converts_in_place().map_err(|call| call.errno)
        };
        assert_eq!(answer(libc::EINVAL), Ok(false));
        assert_eq!(answer(libc::ENOTTY), Ok(false));
        assert_eq!(answer(libc::ENOMEM), Err(libc::ENOMEM));
        kernel.fail(None);
        assert_eq!(trial.converts_in_place(), Ok(true));
    }

    #[test]
    fn the_flag_that_three_series_claim_is_told_by_what_it_does() {
        for kind in [VmKind::Ordinary, VmKind::InPlace] {
            let meaning = |contested| {
                let kernel = FakeKernel::new(kind);
                kernel.set_contested(contested);
                let probe = found(&kernel).unwrap();
                let Probe {
                    huge_page_sizes,
                    write_populate,
                    no_direct_map,
                    ..
                } = probe;
                let unknown = probe.to_string().contains("bit 2");
                (huge_page_sizes, write_populate, no_direct_map, unknown)
            };
            assert_eq!(meaning(Contested::Nothing), (0, false, false, false));
            let both = 2 << 20 | 1 << 30;
            assert_eq!(meaning(Contested::HugePages), (both, false, false, false));
            assert_eq!(meaning(Contested::Write), (0, true, false, false));
            assert_eq!(meaning(Contested::NoDirectMap), (0, false, true, false));
            assert_eq!(meaning(Contested::Other), (0, false, false, true));
        }
    }

    #[test]
    fn where_no_page_can_be_shared_the_flag_stays_unused() {
        let kernel = FakeKernel::new(VmKind::Confidential);
        kernel.set_contested(Contested::NoDirectMap);
        let probe = found(&kernel).unwrap();
        assert!(!probe.no_direct_map);
        assert!(probe.to_string().contains("bit 2"), "{probe}");
    }

    #[test]
    fn huge_pages_are_found_whether_the_pool_has_some_or_not() {
        let kernel = FakeKernel::new(VmKind::InPlace);
        let empty = found(&kernel).unwrap();
        kernel.set_pool(1);
        assert_eq!(found(&kernel).unwrap(), empty);
        assert_eq!(kernel.pool_free(), 1, "trials end at once");
    }

    #[test]
    fn a_call_that_fails_is_no_answer() {
        for contested in [Contested::HugePages, Contested::NoDirectMap] {
            let kernel = FakeKernel::new(VmKind::InPlace);
            kernel.set_contested(contested);
            let expected = found(&kernel).unwrap();
            kernel.fail(None);
            found(&kernel).unwrap();
            for first in 0..kernel.calls().len() {
                let (count, errno) = (1, libc::EMFILE);
                kernel.fail(Some(Failures {
                    first,
                    count,
                    errno,
                }));
                match found(&kernel) {
                    Err(error) => assert_eq!(error.errno(), errno, "call {first}"),
                    // A write that fails says that the file can't be written.
                    Ok(probe) => assert_eq!(probe, expected, "call {first}"),
                }
            }
        }
    }
}
