// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where a block's bytes live.
//!
//! *In-place*: one guest_memfd, mapped here, holds every page, of whichever attribute; a page keeps
//! its memory when it converts. *Split*: a memfd, mapped here, holds
//! the shared pages and a guest_memfd without a mapping the private ones; a page has memory in one
//! of them at most, but for what it has just left (invariant 4; [`kept`]). The memfd may have huge pages, from a pool or as the kernel sees
//! fit: then memory goes by these, and one stays as long as any of its pages is shared. A guest_memfd
//! may have them from the pool, set aside for all of it when it is created; the kernel splits one
//! while any of its pages is shared.

mod allocator;
mod converting;
mod kept;
mod preallocate;
mod stamps;

use crate::attributes::Attribute;
use crate::error::{Cause, Doing, Error, Of, Result};
use crate::kernel::abi::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};
use crate::kernel::abi_coming::GUEST_MEMFD_FLAG_CONTESTED;
use crate::kernel::{CallError, Kernel, Mapping, NumaPolicy, Outsider};
use crate::run_set::Spans;
use crate::stats::BlockCounters;
use crate::sync::{Arc, Instant};
use crate::units::{Offset, Span, PAGE_SIZE};
use allocator::Allocator;
use kept::Kept;
use log::debug;
use smallvec::SmallVec;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub(crate) use converting::{Converting, Halted, Patience};
pub(crate) use kept::{Back, Keeping, Which};
pub(crate) use preallocate::preallocate;

/// How a block's two halves are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// One guest_memfd for all bytes, private and shared. In an ordinary VM every page of it is
    /// shared for good; else the kernel must be able to convert pages where they are.
    InPlace,
    /// A memfd for the bytes of shared pages, a guest_memfd for those of private ones.
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

/// The files of a block.
#[derive(Debug)]
struct Files {
    shared: OwnedFd,
    /// Split only: in-place keeps both halves in `shared`.
    private: Option<OwnedFd>,
}

impl Files {
    /// The one with the bytes of pages that have `attribute`.
    fn of(&self, attribute: Attribute) -> BorrowedFd<'_> {
        match (attribute, &self.private) {
            (Attribute::Private, Some(private)) => private.as_fd(),
            _ => self.shared.as_fd(),
        }
    }
}

/// The files of a block, and the mapping of its shared bytes.
#[derive(Debug)]
pub(crate) struct Planes {
    kernel: Arc<dyn Kernel>,
    /// With a policy only. Before the files, of which it has a share.
    allocator: Option<Allocator>,
    policy: Option<NumaPolicy>,
    /// Before the files, so that it is unmapped before they are closed.
    mapping: Mapping,
    files: Arc<Files>,
    name: String,
    block: Span<Offset>,
    pages: Pages,
    kept: Kept,
    kept_from: SmallVec<[Outsider; 2]>,
    initial: Attribute,
    reserve: bool,
    direct_map: bool,
}

/// Of what pages the shared plane is.
#[derive(Clone, Copy, Debug)]
enum Pages {
    /// Single ones.
    Small,
    /// Single ones, and huge ones of so many bytes where the kernel finds them. A huge one that a
    /// device has pinned can't be split: punching a part of it frees nothing
    /// (truncate_inode_partial_folio).
    Transparent(u64),
    /// From a pool, of so many bytes.
    Huge(u64),
    /// The same of a guest_memfd, for both attributes.
    InPlace(u64),
}

/// What planes are to be like.
#[derive(Debug)]
pub(crate) struct PlanesConfig<'a> {
    /// What messages call them.
    pub(crate) name: &'a str,
    /// All offsets; with huge pages, a multiple of them.
    pub(crate) block: Span<Offset>,
    pub(crate) backing: Backing,
    /// What every page is at first.
    pub(crate) initial: Attribute,
    /// From the host's pool, for the shared plane or for the one that there is.
    pub(crate) huge_page: Option<u64>,
    /// Shared memory is to be there when a conversion returns, not when it is touched.
    pub(crate) reserve: bool,
    /// For both planes.
    pub(crate) policy: Option<NumaPolicy>,
    /// Whether the kernel keeps the memory in its direct map; in place only if not.
    pub(crate) direct_map: bool,
    /// Memory that pages have left; of a split block only.
    pub(crate) keeping: Keeping,
    /// Who is not to find the mapping.
    pub(crate) kept_from: &'a [Outsider],
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
        let guest_memfd = guest_memfd(&*kernel, vm, config)?;
        let (shared, private) = match config.backing {
            Backing::InPlace => (guest_memfd, None),
            Backing::Split => {
                let shared = match config.huge_page {
                    None => kernel
                        .create_memfd(name, size)
                        .doing(|| format!("creating a memfd of {size:#x} bytes"))
                        .of(name)?,
                    Some(page) => kernel
                        .create_huge_memfd(name, size, page)
                        .doing(|| {
                            let page = readable(page);
                            format!("creating a memfd of {size:#x} bytes in huge pages of {page}")
                        })
                        .map_err(|error| {
                            error.with_remedy(format!("does the host have {}?", pool(page)))
                        })
                        .of(name)?,
                };
                (shared, Some(guest_memfd))
            }
        };
        // KVM maps a guest's huge pages only where this address has their alignment too.
        let alignment = match config.backing {
            Backing::InPlace => config.huge_page.unwrap_or(PAGE_SIZE),
            Backing::Split => PAGE_SIZE,
        };
        let mapping = kernel
            .map(shared.as_fd(), size, alignment)
            .doing(|| format!("mapping its {size:#x} shared bytes"))
            .of(name)?;
        let pages = match (config.backing, config.huge_page) {
            (Backing::Split, Some(page)) => Pages::Huge(page),
            (Backing::Split, None) => transparent(&*kernel, &mapping),
            (Backing::InPlace, Some(page)) => Pages::InPlace(page),
            (Backing::InPlace, None) => Pages::Small,
        };
        let files = Arc::new(Files { shared, private });
        let allocator = match config.policy.clone() {
            None => None,
            Some(policy) => {
                let started = Allocator::start(kernel.clone(), files.clone(), policy.clone());
                let started = started.doing(|| format!("a thread that allocates by {policy}"));
                Some(started.of(name)?)
            }
        };
        let keeping = match config.backing {
            Backing::Split => config.keeping,
            // A page keeps its memory.
            Backing::InPlace => Keeping::NONE,
        };
        // A pool's pages are there as long as a page of theirs is shared.
        let promised = config.reserve && !matches!(pages, Pages::Huge(_));
        let planes = Self {
            kernel,
            allocator,
            policy: config.policy.clone(),
            mapping,
            files,
            name: name.to_string(),
            block,
            pages,
            kept: Kept::new(keeping, block, promised),
            kept_from: config.kept_from.into(),
            initial: config.initial,
            reserve: config.reserve,
            direct_map: config.direct_map,
        };
        planes.set_mapping_policy()?;
        planes.keep_from_outsiders()?;
        Ok(planes)
    }

    fn keep_from_outsiders(&self) -> Result<()> {
        self.kept_from.iter().try_for_each(|&whom| {
            self.kernel
                .keep_from(&self.mapping, whom)
                .doing(|| format!("keeping its memory from {whom:?}"))
                .of(&self.name)
        })
    }

    fn set_mapping_policy(&self) -> Result<()> {
        match &self.policy {
            None => Ok(()),
            Some(policy) => self
                .kernel
                .set_mapping_policy(&self.mapping, policy)
                .doing(|| format!("setting {policy}"))
                .of(&self.name),
        }
    }

    /// Makes the policy that of the calling thread, which must be one of ours.
    fn enter_policy(&self) -> Result<()> {
        match &self.policy {
            None => Ok(()),
            Some(policy) => self
                .kernel
                .set_thread_policy(policy)
                .doing(|| format!("setting {policy} for a thread"))
                .of(&self.name),
        }
    }

    /// Makes the mapping's addresses ones that can't be touched, where they show a guest_memfd.
    pub(crate) fn hide(&self) -> Result<()> {
        match self.backing() {
            Backing::Split => Ok(()),
            Backing::InPlace => self
                .kernel
                .hide(&self.mapping)
                .doing(|| "unmapping its guest_memfd".into())
                .of(&self.name),
        }
    }

    /// Undoes [`Planes::hide`]. On failure whoever touches it may get SIGSEGV.
    pub(crate) fn show_again(&self) -> Result<()> {
        match self.backing() {
            Backing::Split => Ok(()),
            Backing::InPlace => self.show(),
        }
    }

    /// Maps the file with the shared bytes over whatever is at the mapping's addresses.
    fn show(&self) -> Result<()> {
        self.kernel
            .map_over(&self.mapping, self.file(Attribute::Shared))
            .doing(|| "mapping its shared bytes again".into())
            .of(&self.name)?;
        // What the old mapping was told of is forgotten.
        if self.huge_pages_are_transparent() {
            advise_huge_pages(&*self.kernel, &self.mapping);
        }
        self.keep_from_outsiders()?;
        self.set_mapping_policy()
    }

    /// Closes the guest_memfd, whose number names the file `nothing` from now on, and drops shared
    /// bytes. The mapping is hidden.
    pub(crate) fn close(&self, nothing: BorrowedFd) -> Result<()> {
        let closed = self
            .kernel
            .replace(self.file(Attribute::Private), nothing)
            .doing(|| "closing its guest_memfd".into())
            .of(&self.name);
        closed.and(self.drop_shared())
    }

    fn drop_shared(&self) -> Result<()> {
        // Its file is another one, or is about to be.
        self.kept.is_freed(self.block, Attribute::Private);
        match self.backing() {
            Backing::Split => self.release(self.block, Attribute::Shared),
            Backing::InPlace => Ok(()),
        }
    }

    /// Opens and maps a new guest_memfd, of another VM, under the old number and address. On failure
    /// it may be open and mapped, or not.
    pub(crate) fn reopen(&self, vm: BorrowedFd) -> Result<()> {
        let config = PlanesConfig {
            name: &self.name,
            block: self.block,
            backing: self.backing(),
            initial: self.initial,
            huge_page: self.huge_page(),
            reserve: self.reserve,
            policy: None,
            direct_map: self.direct_map,
            keeping: Keeping::NONE,
            kept_from: &[],
        };
        let file = guest_memfd(&*self.kernel, vm, &config)?;
        self.kernel
            .replace(self.file(Attribute::Private), file.as_fd())
            .doing(|| "taking a new guest_memfd".into())
            .of(&self.name)?;
        // What the VMM may have touched meanwhile, or what could not be dropped when it was time.
        self.drop_shared()?;
        // In place, the file is a new one. In split it is the old one, but the VMM may have put other
        // memory at its addresses while the VM had none.
        self.show()
    }

    pub(crate) fn backing(&self) -> Backing {
        match self.files.private {
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

    /// Size of the pages, of the shared plane's in a split block, if they are, or may be, huge.
    pub(crate) fn huge_page(&self) -> Option<u64> {
        match self.pages {
            Pages::Small => None,
            Pages::Transparent(page) | Pages::Huge(page) | Pages::InPlace(page) => Some(page),
        }
    }

    /// Size of the pages, if they come from a pool.
    pub(crate) fn pool_page(&self) -> Option<u64> {
        match self.pages {
            Pages::Huge(page) | Pages::InPlace(page) => Some(page),
            Pages::Small | Pages::Transparent(_) => None,
        }
    }

    /// The same, of a shared plane whose pages must have memory as long as they are shared.
    pub(crate) fn promised_page(&self) -> Option<u64> {
        match self.pages {
            Pages::Huge(page) if self.must_allocate(Attribute::Shared) => Some(page),
            _ => None,
        }
    }

    /// The file with the bytes of pages that have `attribute`.
    pub(crate) fn file(&self, attribute: Attribute) -> BorrowedFd<'_> {
        self.files.of(attribute)
    }

    /// The guest_memfd, where it converts.
    pub(crate) fn converting(&self) -> Converting<'_> {
        Converting {
            kernel: &*self.kernel,
            file: self.file(Attribute::Private),
            huge_page: self.huge_page(),
        }
    }

    /// Whether pages that become `attribute` need memory before their conversion returns: not only
    /// when they are touched.
    ///
    /// Under a policy, private pages do. When a guest touches one, kvm_gmem_get_folio allocates it by
    /// the policy of the file, which only a mapping could set, or else of the vCPU's thread: neither
    /// is ours. Devices take huge pages from their own node (memfd_alloc_folio).
    pub(crate) fn must_allocate(&self, attribute: Attribute) -> bool {
        let policy = self.policy.is_some();
        match attribute {
            // It keeps what it has.
            _ if self.backing() == Backing::InPlace => false,
            Attribute::Shared => self.reserve || (policy && self.has_pool()),
            Attribute::Private => policy,
        }
    }

    /// Whether pages that are `initial` in a new block need memory before anybody touches them.
    /// Ordinary ones don't: there is some when they are touched. A pool of huge pages may be empty
    /// then, and whoever touches them gets SIGBUS. Under a policy, private pages do as ever, and so
    /// do all of a guest_memfd in place, whose mapping passes no policy on before Linux 6.19.
    pub(crate) fn must_allocate_initially(&self, initial: Attribute) -> bool {
        let in_place = self.backing() == Backing::InPlace;
        match initial {
            _ if in_place => self.policy.is_some(),
            Attribute::Shared => self.has_pool() && self.must_allocate(initial),
            Attribute::Private => self.must_allocate(initial),
        }
    }

    fn huge_pages_are_transparent(&self) -> bool {
        matches!(self.pages, Pages::Transparent(_))
    }

    /// Whether the kernel can reach all of it by addresses of its own. What it can't, nobody can pin,
    /// devices included.
    pub(crate) fn is_in_direct_map(&self) -> bool {
        self.direct_map
    }

    fn has_pool(&self) -> bool {
        matches!(self.pages, Pages::Huge(_))
    }

    /// Allocates what a new block has to have.
    pub(crate) fn allocate_initial(&self, initial: Attribute) -> Result<()> {
        if self.must_allocate_initially(initial) {
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            preallocate(self, &[(self.block, initial)], threads)?;
        }
        Ok(())
    }

    /// Whether a device's mapping allocates shared memory as well as [`Planes::allocate`] does. Huge
    /// pages are taken before: an empty pool is to be told from a limit on pinned memory.
    pub(crate) fn pinning_allocates(&self) -> bool {
        !self.has_pool()
    }

    /// What may have memory because `span` has, in the plane of `attribute`: whole pages of that
    /// plane, the last of which may reach beyond the block where they are not from a pool.
    pub(crate) fn pages_around(&self, span: Span<Offset>, attribute: Attribute) -> Span<Offset> {
        match (attribute, self.huge_page()) {
            (Attribute::Shared, Some(page)) => span.hull(page),
            (Attribute::Private, Some(page)) if self.backing() == Backing::InPlace => {
                span.hull(page)
            }
            _ => span,
        }
    }

    /// What [`Planes::allocate`] allocates for `span`.
    pub(crate) fn allocated_for(&self, span: Span<Offset>, attribute: Attribute) -> Span<Offset> {
        match self.pages {
            Pages::Huge(_) | Pages::InPlace(_) => self.pages_around(span, attribute),
            Pages::Small | Pages::Transparent(_) => span,
        }
    }

    /// Allocates the huge pages that lie in `span` as a whole, where huge pages come as the kernel
    /// finds them. They do by way of the mapping only, which is advised to have them
    /// (shmem_allowable_huge_orders).
    pub(crate) fn allocate_huge(&self, span: Span<Offset>) -> Result<()> {
        let Pages::Transparent(page) = self.pages else {
            return Ok(());
        };
        let Some(whole) = span.whole(page) else {
            return Ok(());
        };
        self.kernel
            .populate(&self.mapping, whole)
            .doing(|| format!("reserving shared memory for {whole}"))
            .of(&self.name)
    }

    /// Gives every page of `span` memory in the plane of `attribute`, from where the policy says.
    pub(crate) fn allocate(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        let Some(allocator) = &self.allocator else {
            return self.allocate_here(span, attribute);
        };
        if attribute == Attribute::Shared {
            self.allocate_huge(span)?;
        }
        let pages = self.allocated_for(span, attribute);
        let allocated = allocator.allocate(pages, attribute);
        allocated.map_err(|call| self.not_allocated(span, attribute, call))?;
        self.have_memory(pages, attribute);
        Ok(())
    }

    /// As [`Planes::allocate`], from where this thread's policy says.
    fn allocate_here(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        if attribute == Attribute::Shared {
            self.allocate_huge(span)?;
        }
        let pages = self.allocated_for(span, attribute);
        self.kernel
            .allocate(self.file(attribute), pages)
            .map_err(|call| self.not_allocated(span, attribute, call))?;
        self.have_memory(pages, attribute);
        Ok(())
    }

    fn have_memory(&self, pages: Span<Offset>, attribute: Attribute) {
        if attribute == Attribute::Shared {
            self.kept.is_backed(pages);
        }
    }

    #[cold]
    fn not_allocated(&self, span: Span<Offset>, attribute: Attribute, call: CallError) -> Error {
        let by = match &self.policy {
            None => String::new(),
            Some(policy) => format!(" by {policy}"),
        };
        let error = match (attribute, self.pages) {
            (Attribute::Shared, Pages::Huge(page)) => {
                let size = readable(page);
                let doing =
                    format!("taking huge pages of {size} for {span}{by} from the host's pool");
                // A page's tables may fail as well, which is another matter (alloc_hugetlb_folio).
                let cause = match call.errno {
                    libc::ENOSPC => Cause::PoolEmpty(call),
                    _ => Cause::Call(call),
                };
                Error::new(cause, doing).with_remedy(size_of_pool(page))
            }
            _ => {
                let doing = format!("reserving {} memory for {span}{by}", attribute.name());
                Error::new(Cause::Call(call), doing)
            }
        };
        error.of(&self.name)
    }

    /// Frees what `span` holds in the plane of `attribute`. Split only: in-place both attributes
    /// share the bytes. Where `span` ends within a huge page, that one is zeroed so far and stays.
    pub(crate) fn release(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        debug_assert_eq!(self.backing(), Backing::Split);
        self.discard(span, attribute)
    }

    /// The same, in place too, where pages of either attribute lose their bytes.
    pub(crate) fn discard(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        let freed = self
            .kernel
            .punch_hole(self.file(attribute), span)
            .doing(|| format!("releasing {} memory of {span}", attribute.name()))
            .of(&self.name);
        // Should it have failed, nobody knows what is there. Not before: until then it counts as kept.
        self.kept.is_freed(span, attribute);
        freed
    }

    /// What pages have left, which `span` just has, may be kept for a while: then there is nothing to
    /// release for now.
    pub(crate) fn keep(&self, span: Span<Offset>, attribute: Attribute) -> bool {
        match self.freed_with(span, attribute) {
            Some(freed) => self.kept.keep(freed, attribute),
            None => self.kept.may(attribute),
        }
    }

    /// What of `span` holds memory that can be had when its pages have left the plane: of a huge page
    /// from a pool that has a page left, nothing.
    fn freed_with(&self, span: Span<Offset>, attribute: Attribute) -> Option<Span<Offset>> {
        match self.pages {
            Pages::Huge(page) if attribute == Attribute::Shared => span.whole(page),
            _ => Some(span),
        }
    }

    /// From now on nothing is kept: nobody would release it.
    pub(crate) fn keep_nothing(&self) {
        self.kept.stop();
    }

    /// Whether anything is ever kept of what pages of this attribute hold.
    pub(crate) fn may_keep(&self, attribute: Attribute) -> bool {
        self.kept.may(attribute)
    }

    /// Pages come back to a plane: what is kept there for them is theirs again.
    pub(crate) fn take_back(&self, span: Span<Offset>, attribute: Attribute) -> Back {
        self.kept.take_back(span, attribute)
    }

    /// How long memory that pages have left is kept, and how much of it.
    pub(crate) fn keeping(&self) -> Keeping {
        self.kept.keeping()
    }

    /// Bytes that are kept.
    pub(crate) fn kept_bytes(&self) -> u64 {
        self.kept.bytes()
    }

    /// Memory that the record of it takes at most, but for a constant.
    pub(crate) fn footprint(&self) -> u64 {
        self.kept.footprint()
    }

    /// What of `span` is kept.
    pub(crate) fn kept(
        &self,
        span: Span<Offset>,
        attribute: Attribute,
        which: Which,
    ) -> Spans<Offset> {
        self.kept.inside(span, attribute, which)
    }

    /// The first page from `from` on that is kept.
    pub(crate) fn first_kept(&self, from: u64, attribute: Attribute, which: Which) -> Option<u64> {
        self.kept.first_from(from, attribute, which)
    }

    /// When what has been kept long enough is to be released, and [`Planes::age`] called; `None` if nothing
    /// is kept.
    pub(crate) fn next_age(&self) -> Option<Instant> {
        self.kept.next_age()
    }

    /// A delay has passed for what is kept. When the next one has; `None` if nothing is kept.
    pub(crate) fn age(&self, now: Instant) -> Option<Instant> {
        self.kept.age(now)
    }

    /// Frees what may be kept of `span`, and zeroes nothing.
    pub(crate) fn release_kept(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        // What stays is kept as before.
        let freed = self.freed_with(span, attribute);
        freed.map_or(Ok(()), |freed| self.release(freed, attribute))
    }

    /// As `discard`, for pages whose memory the host has lost: the next access finds fresh memory.
    /// A huge page in `span` may reach beyond the block, and is to go as a whole; the mapping doesn't.
    pub(crate) fn renew(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        self.discard(span, attribute)?;
        // The private file of a split block is mapped nowhere; at its addresses are shared pages.
        if attribute == Attribute::Private && self.backing() == Backing::Split {
            return Ok(());
        }
        let Some(mapped) = span.intersection(&self.block) else {
            return Ok(());
        };
        self.kernel
            .forget_mapped(&self.mapping, mapped)
            .doing(|| format!("forgetting the lost memory of {span}"))
            .of(&self.name)
    }
}

/// Creates the guest_memfd of a block, whose pages are all what they are to be at first.
fn guest_memfd(kernel: &dyn Kernel, vm: BorrowedFd, config: &PlanesConfig) -> Result<OwnedFd> {
    let &PlanesConfig { name, block, .. } = config;
    let size = block.size_bytes();
    let shared = config.initial == Attribute::Shared;
    // The bit's meaning here is what the probe found it to be.
    let unmapped = match config.direct_map {
        true => 0,
        false => GUEST_MEMFD_FLAG_CONTESTED,
    };
    let (flags, order) = match (config.backing, config.huge_page) {
        // No MMAP flag: it would make the slot gmem-only, and the guest's shared accesses would
        // never reach the memfd (kvm_gmem_get_pfn is used for all of a slot whose file has it).
        (Backing::Split, _) => (0, 0),
        (Backing::InPlace, None) if shared => {
            let shared = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
            (shared | unmapped, 0)
        }
        (Backing::InPlace, None) => (GUEST_MEMFD_FLAG_MMAP | unmapped, 0),
        // With INIT_SHARED the kernel refuses huge pages: a shared one is none.
        (Backing::InPlace, Some(page)) => (
            GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_CONTESTED,
            (page.ilog2() - PAGE_SIZE.ilog2()) as u8,
        ),
    };
    let file = kernel
        .create_guest_memfd(vm, size, flags, order)
        .map_err(|call| not_created(config, flags, call))?;
    if order != 0 && shared {
        let converting = Converting {
            kernel,
            file: file.as_fd(),
            huge_page: config.huge_page,
        };
        // Nobody asks what this block has cost.
        let counters = BlockCounters::default();
        converting
            .convert(
                block,
                Attribute::Shared,
                &mut Patience::default(),
                &counters,
            )
            .map_err(|halted| halted.stopped.call)
            .doing(|| "sharing its huge pages at first, which splits them".into())
            .of(name)?;
    }
    Ok(file)
}

#[cold]
fn not_created(config: &PlanesConfig, flags: u64, call: CallError) -> Error {
    let size = config.block.size_bytes();
    let doing =
        |pages| format!("creating a guest_memfd of {size:#x} bytes{pages}, flags {flags:#x}");
    let error = match (config.backing, config.huge_page) {
        (Backing::InPlace, Some(page)) => {
            let of = readable(page);
            let pages = format!(" in huge pages of {of}, all of them from the host's pool at once");
            // It says the same when it has no other memory, which is rare.
            let cause = match call.errno {
                libc::ENOMEM => Cause::PoolEmpty(call),
                _ => Cause::Call(call),
            };
            Error::new(cause, doing(pages)).with_remedy(size_of_pool(page))
        }
        _ => Error::new(Cause::Call(call), doing(String::new())),
    };
    error.of(config.name)
}

/// Whether a memfd that is mapped here gets huge pages. Where it does it is advised to: they cost
/// fewer IOMMU entries and far fewer allocations.
fn transparent(kernel: &dyn Kernel, mapping: &Mapping) -> Pages {
    let Some(page) = kernel.transparent_huge_page() else {
        return Pages::Small;
    };
    advise_huge_pages(kernel, mapping);
    Pages::Transparent(page)
}

fn advise_huge_pages(kernel: &dyn Kernel, mapping: &Mapping) {
    if let Err(call) = kernel.advise_huge_pages(mapping) {
        debug!("shared memory has no huge pages of its own accord: {call}");
    }
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

fn size_of_pool(page: u64) -> String {
    format!("the pool's size is in {}", pool(page))
}
