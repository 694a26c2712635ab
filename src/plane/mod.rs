// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where a block's bytes live.
//!
//! *In-place*: one guest_memfd, mapped here, holds every page. *Split*: a memfd, mapped here, holds
//! the shared pages and a guest_memfd without a mapping the private ones; a page has memory in one
//! of them at most (invariant 4). The memfd may have huge pages, from a pool or as the kernel sees
//! fit: then memory goes by these, and one stays as long as any of its pages is shared.

mod preallocate;

use crate::attributes::Attribute;
use crate::error::{Doing, Result};
use crate::kernel::abi::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};
use crate::kernel::{Kernel, Mapping};
use crate::units::{Offset, Span};
use log::{debug, error};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

pub(crate) use preallocate::preallocate;

/// How a block's two halves are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// One guest_memfd for everything. On Linux 7.3 every page of it is shared for good.
    InPlace,
    /// A memfd for shared pages, a guest_memfd for private ones.
    Split,
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backing::InPlace => "in-place",
            Backing::Split => "split",
        })
    }
}

/// The files of a block, and the mapping of its shared bytes.
#[derive(Debug)]
pub(crate) struct Planes {
    kernel: Arc<dyn Kernel>,
    /// Before the files, so that it is unmapped before they are closed.
    mapping: Mapping,
    shared: OwnedFd,
    /// Split only: in-place keeps both halves in `shared`.
    private: Option<OwnedFd>,
    name: String,
    block: Span<Offset>,
    pages: SharedPages,
    reserve: bool,
}

/// Of what pages the shared plane is.
#[derive(Clone, Copy, Debug)]
enum SharedPages {
    /// Single ones.
    Small,
    /// Single ones, and huge ones of so many bytes where the kernel finds them. A huge one that a
    /// device has pinned can't be split: punching a part of it frees nothing
    /// (truncate_inode_partial_folio).
    Transparent(u64),
    /// From a pool, of so many bytes.
    Huge(u64),
}

/// What planes are to be like.
#[derive(Debug)]
pub(crate) struct PlanesConfig<'a> {
    /// What messages call them.
    pub(crate) name: &'a str,
    /// All offsets; with huge pages, a multiple of them.
    pub(crate) block: Span<Offset>,
    pub(crate) backing: Backing,
    /// For the shared plane, split only.
    pub(crate) huge_page: Option<u64>,
    /// Shared memory is to be there when a conversion returns, not when it is touched.
    pub(crate) reserve: bool,
}

impl Planes {
    /// Creates the files of a block. What fails leaves nothing behind.
    pub(crate) fn new(
        kernel: Arc<dyn Kernel>,
        vm: BorrowedFd,
        config: &PlanesConfig,
    ) -> Result<Self> {
        let &PlanesConfig { name, block, .. } = config;
        let size = block.size_bytes();
        let guest_memfd = guest_memfd(&*kernel, vm, config.backing, name, block)?;
        let (shared, private) = match config.backing {
            Backing::InPlace => (guest_memfd, None),
            Backing::Split => {
                let shared = match config.huge_page {
                    None => kernel
                        .create_memfd(name, size)
                        .doing(|| format!("{name}: creating a memfd of {size:#x} bytes"))?,
                    Some(page) => kernel.create_huge_memfd(name, size, page).doing(|| {
                        format!(
                            "{name}: creating a memfd of {size:#x} bytes in huge pages of {} (does \
                             the host have {}?)",
                            readable(page),
                            pool(page)
                        )
                    })?,
                };
                (shared, Some(guest_memfd))
            }
        };
        let mapping = kernel
            .map(shared.as_fd(), size)
            .doing(|| format!("{name}: mapping its {size:#x} shared bytes"))?;
        let pages = match (config.backing, config.huge_page) {
            (Backing::Split, Some(page)) => SharedPages::Huge(page),
            (Backing::Split, None) => transparent(&*kernel, &mapping),
            (Backing::InPlace, _) => SharedPages::Small,
        };
        Ok(Self {
            kernel,
            mapping,
            shared,
            private,
            name: name.to_string(),
            block,
            pages,
            reserve: config.reserve,
        })
    }

    /// Makes the mapping's addresses ones that can't be touched, where they show a guest_memfd.
    pub(crate) fn hide(&self) -> Result<()> {
        match self.backing() {
            Backing::Split => Ok(()),
            Backing::InPlace => self
                .kernel
                .hide(&self.mapping)
                .doing(|| format!("{}: unmapping its guest_memfd", self.name)),
        }
    }

    /// Undoes [`Planes::hide`].
    pub(crate) fn show_again(&self) {
        if let Err(error) = self.show() {
            error!("{error}: whoever touches it gets SIGSEGV");
        }
    }

    fn show(&self) -> Result<()> {
        match self.backing() {
            Backing::Split => Ok(()),
            Backing::InPlace => self
                .kernel
                .map_over(&self.mapping, self.shared.as_fd())
                .doing(|| format!("{}: mapping its guest_memfd again", self.name)),
        }
    }

    /// Closes the guest_memfd, whose number names the file `nothing` from now on, and drops shared
    /// bytes. The mapping is hidden.
    pub(crate) fn close(&self, nothing: BorrowedFd) -> Result<()> {
        let closed = self
            .kernel
            .replace(self.file(Attribute::Private), nothing)
            .doing(|| format!("{}: closing its guest_memfd", self.name));
        closed.and(self.drop_shared())
    }

    fn drop_shared(&self) -> Result<()> {
        match self.backing() {
            Backing::Split => self.release(self.block, Attribute::Shared),
            Backing::InPlace => Ok(()),
        }
    }

    /// Opens and maps a new guest_memfd, of another VM, under the old number and address. On failure
    /// it may be open and mapped, or not.
    pub(crate) fn reopen(&self, vm: BorrowedFd) -> Result<()> {
        let file = guest_memfd(&*self.kernel, vm, self.backing(), &self.name, self.block)?;
        self.kernel
            .replace(self.file(Attribute::Private), file.as_fd())
            .doing(|| format!("{}: taking a new guest_memfd", self.name))?;
        // What the VMM may have touched meanwhile, or what could not be dropped when it was time.
        self.drop_shared()?;
        self.show()
    }

    pub(crate) fn backing(&self) -> Backing {
        match self.private {
            None => Backing::InPlace,
            Some(_) => Backing::Split,
        }
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// All offsets.
    pub(crate) fn block(&self) -> Span<Offset> {
        self.block
    }

    /// Size of the shared plane's pages if they are, or may be, huge.
    pub(crate) fn huge_page(&self) -> Option<u64> {
        match self.pages {
            SharedPages::Small => None,
            SharedPages::Transparent(page) | SharedPages::Huge(page) => Some(page),
        }
    }

    /// The file with the bytes of pages that have `attribute`.
    pub(crate) fn file(&self, attribute: Attribute) -> BorrowedFd<'_> {
        match (attribute, &self.private) {
            (Attribute::Private, Some(private)) => private.as_fd(),
            _ => self.shared.as_fd(),
        }
    }

    /// Whether pages that become `attribute` need memory before their conversion returns: not only
    /// when they are touched.
    pub(crate) fn must_allocate(&self, attribute: Attribute) -> bool {
        attribute == Attribute::Shared && self.reserve
    }

    /// Whether pages that are `initial` in a new block need memory before anybody touches them.
    /// Ordinary ones don't: there is some when they are touched. A pool of huge pages may be empty
    /// then, and whoever touches them gets SIGBUS.
    pub(crate) fn must_allocate_initially(&self, initial: Attribute) -> bool {
        let scarce = initial == Attribute::Shared && matches!(self.pages, SharedPages::Huge(_));
        scarce && self.must_allocate(initial)
    }

    /// Allocates what a new block has to have.
    pub(crate) fn allocate_initial(&self, initial: Attribute) -> Result<()> {
        if self.must_allocate_initially(initial) {
            self.allocate(self.block, initial)?;
        }
        Ok(())
    }

    /// Whether a device's mapping allocates shared memory as well as [`Planes::allocate`] does. Huge
    /// pages are taken before: an empty pool is to be told from a limit on pinned memory.
    pub(crate) fn pinning_allocates(&self) -> bool {
        !matches!(self.pages, SharedPages::Huge(_))
    }

    /// What may have memory because `span` has, in the plane of `attribute`: whole pages of that
    /// plane.
    pub(crate) fn pages_around(&self, span: Span<Offset>, attribute: Attribute) -> Span<Offset> {
        match (attribute, self.huge_page()) {
            (Attribute::Shared, Some(page)) => span.hull(page),
            _ => span,
        }
    }

    /// What [`Planes::allocate`] allocates for `span`.
    pub(crate) fn allocated_for(&self, span: Span<Offset>, attribute: Attribute) -> Span<Offset> {
        match self.pages {
            SharedPages::Huge(_) => self.pages_around(span, attribute),
            SharedPages::Small | SharedPages::Transparent(_) => span,
        }
    }

    /// Allocates the huge pages that lie in `span` as a whole, where huge pages come as the kernel
    /// finds them. They do by way of the mapping only, which is advised to have them
    /// (shmem_allowable_huge_orders).
    pub(crate) fn allocate_huge(&self, span: Span<Offset>) -> Result<()> {
        let SharedPages::Transparent(page) = self.pages else {
            return Ok(());
        };
        let Some(whole) = span.whole(page) else {
            return Ok(());
        };
        self.kernel
            .populate(&self.mapping, whole)
            .doing(|| format!("{}: reserving shared memory for {whole}", self.name))
    }

    /// Gives every page of `span` memory in the plane of `attribute`.
    pub(crate) fn allocate(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        if attribute == Attribute::Shared {
            self.allocate_huge(span)?;
        }
        let pages = self.allocated_for(span, attribute);
        self.kernel
            .allocate(self.file(attribute), pages)
            .doing(|| match (attribute, self.pages) {
                (Attribute::Shared, SharedPages::Huge(page)) => format!(
                    "{}: taking huge pages of {} for {span} from the host's pool (its size: {})",
                    self.name,
                    readable(page),
                    pool(page)
                ),
                _ => format!(
                    "{}: reserving {} memory for {span}",
                    self.name,
                    attribute.name()
                ),
            })
    }

    /// Frees what `span` holds in the plane of `attribute`. Split only: in-place both attributes
    /// share the bytes. Where `span` ends within a huge page, that one is zeroed so far and stays.
    pub(crate) fn release(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        debug_assert_eq!(self.backing(), Backing::Split);
        self.kernel
            .punch_hole(self.file(attribute), span)
            .doing(|| {
                let (name, attribute) = (&self.name, attribute.name());
                format!("{name}: releasing {attribute} memory of {span}")
            })
    }
}

fn guest_memfd(
    kernel: &dyn Kernel,
    vm: BorrowedFd,
    backing: Backing,
    name: &str,
    block: Span<Offset>,
) -> Result<OwnedFd> {
    let size = block.size_bytes();
    let flags = match backing {
        Backing::InPlace => GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
        // No MMAP flag: it would make the slot gmem-only, and the guest's shared accesses would
        // never reach the memfd (kvm_gmem_get_pfn is used for all of a slot whose file has it).
        Backing::Split => 0,
    };
    kernel
        .create_guest_memfd(vm, size, flags)
        .doing(|| format!("{name}: creating a guest_memfd of {size:#x} bytes, flags {flags:#x}"))
}

/// Whether a memfd that is mapped here gets huge pages. Where it does it is advised to: they cost
/// fewer IOMMU entries and far fewer allocations.
fn transparent(kernel: &dyn Kernel, mapping: &Mapping) -> SharedPages {
    let Some(page) = kernel.transparent_huge_page() else {
        return SharedPages::Small;
    };
    if let Err(call) = kernel.advise_huge_pages(mapping) {
        debug!("shared memory has no huge pages of its own accord: {call}");
    }
    SharedPages::Transparent(page)
}

/// A huge page's size as people write it.
pub(crate) fn readable(page: u64) -> String {
    match page {
        _ if page % (1 << 30) == 0 => format!("{} GiB", page >> 30),
        _ => format!("{} MiB", page >> 20),
    }
}

/// Where the host's administrator sets how many huge pages there are.
pub(crate) fn pool(page: u64) -> String {
    let kib = page >> 10;
    format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages")
}
