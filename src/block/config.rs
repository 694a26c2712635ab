// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a block is to be like, and whether that makes sense.

use crate::attributes::Attribute;
use crate::dma::{DmaPath, DmaSplit};
use crate::error::{Error, Of, Result};
use crate::kernel::{NumaPolicy, Outsider, Probe};
use crate::plane::{readable, Backing, Keeping};
use crate::units::{Offset, Span, PAGE_SIZE};
use std::time::Duration;

/// Private runs that a guest may make in a guest_memfd that converts in place, if nobody says
/// otherwise: more than guests are known to need, and each costs memory, here and in the
/// kernel's maple tree. It protects no kernel from its own faults: see `merge`.
const IN_PLACE_RUNS: u64 = 1400;

/// Longer than a transfer by a bounce buffer takes, shorter than what an administrator notices.
const RELEASE_DELAY: Duration = Duration::from_millis(100);

/// As much as a few requests of 2 MiB from each of some vCPUs.
const MAX_PENDING: u64 = 64 << 20;
/// What one request may change, if nobody says otherwise. Interfaces of real guests ask for less: a page
/// state change of SNP for 253 huge pages of 2 MiB, and of TDX's MapGPA KVM makes requests of 2 MiB.
const MAX_REQUEST: u64 = 1 << 30;

/// Which backing to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackingChoice {
    /// The best backing that the VM and its kernel allow.
    #[default]
    Auto,
    /// This one or none.
    Only(Backing),
}

/// The smallest range that a guest may convert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvertUnit {
    /// Multiples of so many bytes, at multiples of it: a power of two, at least a page.
    Bytes(u64),
    /// Nothing in the block ever changes its attribute, but for a reset.
    Off,
}

/// What a block is to be like.
///
/// # In Rust
/// [`BlockConfig::new`] gives the defaults.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// What messages call it, with a question mark for each control character.
    pub name: String,
    /// Bytes of guest memory, a multiple of 4096.
    pub size: u64,
    /// How its private and its shared bytes are kept.
    pub backing: BackingChoice,
    /// Pages may be private at all.
    pub confidential: bool,
    /// Every page's attribute at first, and after [`Block::reset`](crate::Block::reset).
    pub initial: Attribute,
    /// A conversion to shared fails if there is no memory for it, instead of the first access.
    /// Costs the memory at once.
    pub reserve: bool,
    /// Memory from the host's pool of huge pages. Conversions stay as fine as
    /// [`BlockConfig::convert_unit`]. In a split block it is the shared memory; a huge page is the
    /// host's again when its last page has become private, and without reserved memory
    /// ([`BlockConfig::reserve`]) who touches one gets SIGBUS if the pool is empty. In place it is
    /// all memory, set aside at once, where
    /// [`Probe::huge_page_sizes`](crate::Probe::huge_page_sizes) has the size, and the kernel
    /// splits a huge page while any of its pages is shared.
    ///
    /// # In Rust
    /// Bytes of a huge page: 2 MiB or 1 GiB.
    pub hugetlb: Option<u64>,
    /// From which NUMA nodes memory of both planes comes. `None`: from wherever the thread that
    /// first needs it would get it. Private memory can only be placed when the library allocates
    /// it, so under a policy it is there from the start, or from the conversion on.
    pub policy: Option<NumaPolicy>,
    /// How devices' mappings name memory.
    pub dma: DmaPath,
    /// How windows of a confidential block are mapped.
    pub dma_split: DmaSplit,
    /// The smallest range that the guest may convert.
    pub convert_unit: ConvertUnit,
    /// Most private runs that the guest may make. `None`: in a split block as many as it likes,
    /// since neither the books here (a bit a page at worst) nor KVM's attributes (an entry a page)
    /// grow beyond what the block's size sets; in place 1400, which bounds what a guest can make
    /// the library and the kernel remember. No bound protects a kernel that fails to free its
    /// record of the runs: see [`Vm::end`](crate::Vm::end).
    pub max_runs: Option<u64>,
    /// Most bytes that one request of the guest may change, from the first page of a block that
    /// changes to the last, and in all blocks that it is about together: the smallest bound of
    /// those decides, and more is refused with ENOSPC. The kernel goes through all that lies
    /// between, too. It bounds how long a request takes, what the library needs for it, and what it
    /// has in both planes at once. A reset is not bound by it. `None`: 1 GiB, or the
    /// [`BlockConfig::convert_unit`] if that is more. Real guests stay below: page state changes of
    /// SNP come to 253 huge pages of 2 MiB at most, and TDX's MapGPA in requests of 2 MiB.
    pub max_request: Option<u64>,
    /// The kernel keeps the memory in its own address space (its direct map). To take it out is
    /// experimental, and works only where
    /// [`Probe::no_direct_map`](crate::Probe::no_direct_map) says so: nothing can pin such memory, so
    /// that DMA windows are refused.
    pub direct_map: bool,
    /// How long the memory that a page of a split block leaves is kept before it is the host's
    /// again, so that a page which comes back meanwhile finds it: then nothing is freed, allocated
    /// or cleared. What it finds is what it left: its old shared bytes, or its old private ones
    /// (only with [`BlockConfig::keeps_private`]). Memory is released after one to two delays, or,
    /// where nothing was kept for a while, a second later; before that when memory is short, by
    /// [`Block::reset`](crate::Block::reset) and
    /// [`Block::release_pending`](crate::Block::release_pending), and when the block ends. What is
    /// kept of shared memory stays visible to who has the file or its mapping: host, vhost and
    /// vhost-user back ends; devices that are passed through and the guest don't reach it.
    ///
    /// # In Rust
    /// 100 ms by default. Zero: memory is released in the conversion.
    pub release_delay: Duration,
    /// Most bytes that are kept for [`BlockConfig::release_delay`], in both planes: what comes on
    /// top is released in its conversion.
    ///
    /// # In Rust
    /// 64 MiB by default.
    pub max_pending: u64,
    /// Private memory may be kept, too, so that a page which is shared for a moment finds its old
    /// private bytes: only for VM types of which it is known that the guest's page may outlive the
    /// conversion. So on KVM_X86_SW_PROTECTED_VM. On TDX and SNP the state of a page (S-EPT, RMP)
    /// is tied to its memory, and nobody has shown that it may.
    pub keeps_private: bool,
    /// Children that the process forks have no mapping of the memory (MADV_DONTFORK): one that
    /// touches an address gets SIGSEGV. Without it they have the same memory at the same addresses.
    pub not_in_children: bool,
    /// Core dumps leave the memory out (MADV_DONTDUMP).
    pub not_in_core_dumps: bool,
}

impl BlockConfig {
    /// A block of an ordinary VM, with the defaults.
    pub fn new(name: &str, size: u64) -> Self {
        Self {
            name: name.to_string(),
            size,
            backing: BackingChoice::Auto,
            confidential: false,
            initial: Attribute::Shared,
            reserve: true,
            hugetlb: None,
            policy: None,
            dma: DmaPath::Auto,
            dma_split: DmaSplit::default(),
            convert_unit: ConvertUnit::Bytes(PAGE_SIZE),
            max_runs: None,
            max_request: None,
            direct_map: true,
            release_delay: RELEASE_DELAY,
            max_pending: MAX_PENDING,
            keeps_private: false,
            not_in_children: false,
            not_in_core_dumps: false,
        }
    }

    /// A block of a confidential VM whose pages start as `initial`.
    pub fn confidential(name: &str, size: u64, initial: Attribute) -> Self {
        Self {
            confidential: true,
            initial,
            ..Self::new(name, size)
        }
    }

    /// Checks what needs no kernel, and gives the block's offsets.
    pub(super) fn check(&self) -> Result<Span<Offset>> {
        self.check_all().of(&self.name)
    }

    fn check_all(&self) -> Result<Span<Offset>> {
        // A file's size is signed.
        let most = i64::MAX as u64 & !(PAGE_SIZE - 1);
        let span = Span::new(Offset(0), self.size)
            .filter(|span| span.end() <= most)
            .ok_or_else(|| {
                let flaw = match self.size {
                    0 => "no memory".to_string(),
                    size if size % PAGE_SIZE != 0 => "not a multiple of 4096".to_string(),
                    _ => format!("more than a file can have ({most:#x})"),
                };
                Error::invalid(format!("a size of {:#x} bytes is {flaw}", self.size))
            })?;
        if self.initial == Attribute::Private && !self.confidential {
            return Err(Error::invalid(
                "memory can't start private in an ordinary VM",
            ));
        }
        if let ConvertUnit::Bytes(unit) = self.convert_unit {
            if !unit.is_power_of_two() || unit < PAGE_SIZE || unit > self.size {
                return Err(Error::invalid(format!(
                    "a convert-unit of {unit:#x} bytes is no power of two from 4096 to the \
                     block's size"
                )));
            }
        }
        let least = match self.convert_unit {
            ConvertUnit::Bytes(unit) => unit,
            ConvertUnit::Off => PAGE_SIZE,
        };
        if self.request_bound() < least {
            return Err(Error::invalid(format!(
                "with a max-request of {:#x} bytes and a convert-unit of {least:#x} nothing could convert",
                self.request_bound()
            ))
            .with_remedy("leave max-request out, or turn conversions off by convert-unit"));
        }
        self.check_hugetlb()?;
        if let Some(unit) = self.dma_split.unit() {
            if !unit.is_power_of_two() || unit < PAGE_SIZE || unit > self.size {
                return Err(Error::invalid(format!(
                    "a dma-unit of {unit:#x} bytes is no power of two from 4096 to the \
                     block's size"
                )));
            }
        }
        Ok(span)
    }

    fn check_hugetlb(&self) -> Result<()> {
        let Some(page) = self.hugetlb else {
            return Ok(());
        };
        if !self.confidential {
            return Err(Error::unsupported(
                "hugetlb is for confidential VMs: the kernel has no huge pages for a guest_memfd that is all \
                 shared",
            )
            .with_remedy("leave it out"));
        }
        if ![2 << 20, 1 << 30].contains(&page) {
            return Err(Error::invalid(format!(
                "a hugetlbsize of {page:#x} bytes is neither 2 MiB nor 1 GiB"
            )));
        }
        if self.size % page != 0 {
            return Err(Error::invalid(format!(
                "a size of {:#x} bytes is not a multiple of hugetlbsize, {}",
                self.size,
                readable(page)
            )));
        }
        Ok(())
    }

    /// The backing to use on a kernel, or why the wanted one can't be.
    pub(super) fn backing_on(&self, probe: &Probe) -> Result<Backing> {
        self.able_backing(probe).of(&self.name)
    }

    fn able_backing(&self, probe: &Probe) -> Result<Backing> {
        self.check_direct_map(probe)?;
        let wanted = match (self.backing, self.confidential) {
            (BackingChoice::Auto, true) if probe.in_place_conversion => Backing::InPlace,
            (BackingChoice::Auto, true) => Backing::Split,
            (BackingChoice::Auto, false) => Backing::InPlace,
            (BackingChoice::Only(Backing::Split), false) => {
                return Err(Error::invalid(
                    "backing=split is for confidential VMs; an ordinary one has no private pages to \
                     split off",
                )
                .with_remedy("use in-place or auto"));
            }
            (BackingChoice::Only(backing), _) => backing,
        };
        match wanted {
            Backing::InPlace if self.confidential => probe.require_conversion()?,
            Backing::InPlace => probe.require_in_place()?,
            Backing::Split => probe.require_split()?,
        }
        if !self.direct_map && wanted == Backing::Split {
            return Err(Error::unsupported(
                "direct-map=off is for blocks that are one guest_memfd: the shared half of a split block is \
                 a memfd, which is always in the direct map",
            ));
        }
        match (wanted, self.hugetlb) {
            (Backing::InPlace, Some(page)) if probe.huge_page_sizes & page == 0 => {
                Err(Error::unsupported(format!(
                    "hugetlb: this kernel converts guest_memfd pages in place, and its guest_memfds have no \
                     huge pages of {}",
                    readable(page)
                ))
                .with_remedy("leave it out"))
            }
            _ => Ok(wanted),
        }
    }

    fn check_direct_map(&self, probe: &Probe) -> Result<()> {
        let why = match (self.direct_map, self.hugetlb) {
            (true, _) => return Ok(()),
            (false, _) if !probe.no_direct_map => {
                "needs a kernel whose guest_memfd has NO_DIRECT_MAP, and no kernel that was released \
                 has it"
            }
            // The flag's bit means the one or the other, and only single pages leave the map.
            (false, Some(_)) => "and hugetlb=on exclude each other",
            (false, None) => return Ok(()),
        };
        Err(Error::unsupported(format!("direct-map=off {why}")))
    }

    pub(super) fn kept_from(&self) -> Vec<Outsider> {
        let children = self.not_in_children.then_some(Outsider::Children);
        let dumps = self.not_in_core_dumps.then_some(Outsider::CoreDumps);
        children.into_iter().chain(dumps).collect()
    }

    pub(super) fn keeping(&self) -> Keeping {
        Keeping {
            delay: self.release_delay,
            most: self.max_pending,
            private: self.keeps_private,
        }
    }

    pub(super) fn request_bound(&self) -> u64 {
        self.max_request.unwrap_or(match self.convert_unit {
            ConvertUnit::Bytes(unit) => MAX_REQUEST.max(unit),
            ConvertUnit::Off => MAX_REQUEST,
        })
    }

    pub(super) fn max_runs_on(&self, backing: Backing) -> u64 {
        self.max_runs.unwrap_or(match backing {
            Backing::InPlace => IN_PLACE_RUNS,
            Backing::Split => u64::MAX,
        })
    }
}
