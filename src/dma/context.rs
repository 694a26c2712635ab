// SPDX-License-Identifier: MIT OR Apache-2.0
//! An iommufd context: what one open of /dev/iommu stands for, whatever numbers name it.
//!
//! Cutting an area takes two calls that only work as a pair: the VFIO-compatible unmap has no IOAS
//! in its argument, but goes to the one that the *context* was last pointed at
//! (iommufd_vfio_ioas, get_compat_ioas). So all windows of a context, whichever VM they are of,
//! make the pair under one lock. Whether two contexts are one is the kernel's to tell (kcmp), and it may
//! stop telling at any time: a sandbox begins. What can't be told from others excludes them all.
//!
//! The lock keeps nobody from pointing it elsewhere who has the same file and isn't this library. So a cut has
//! been made when the kernel says that what it was to take is not mapped any more, and not before.

use super::claims::Claims;
use crate::error::{Doing, Error, Result};
use crate::kernel::{CallError, CallResult, DeviceAccess, Ioas, Kernel};
use crate::run_set::Spans;
use crate::stats::BlockCounters;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{statics, Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use crate::throttle::limited;
use crate::units::{Iova, Offset, Span, PAGE_SIZE};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

statics! {
    /// All contexts that are in use.
    static CONTEXTS: Mutex<Vec<Weak<Context>>> = Mutex::new(Vec::new());

    /// Held by all that cut: for reading by those that have a lock of their own, and for writing by those
    /// that may be the same context as any other.
    static CUTS: RwLock<()> = RwLock::new(());
}

/// How often a cut is tried before a window does without for its life.
const TRIALS: u32 = 3;

/// Whether a cut that failed so may work the next time: no memory at this moment, or (ENOENT) somebody
/// outside this library pointed the context elsewhere.
fn may_pass(errno: i32) -> bool {
    matches!(
        errno,
        libc::ENOMEM | libc::EAGAIN | libc::EBUSY | libc::EINTR | libc::ENOENT
    )
}

#[derive(Debug)]
pub(super) struct Context {
    kernel: Arc<dyn Kernel>,
    fd: OwnedFd,
    /// Which IOAS the context points at may change only under it, and [`CUTS`] for reading. `None`: the
    /// kernel wouldn't tell it from another context, which may have a lock, and it takes [`CUTS`] for
    /// writing.
    compat: Option<Mutex<()>>,
    /// A cut was tried here and does what it should.
    cuts: AtomicBool,
    /// Locked for moments only.
    claims: Mutex<Claims>,
}

impl Context {
    /// The context behind a number, which may be closed afterwards.
    pub(super) fn open(kernel: &Arc<dyn Kernel>, iommufd: BorrowedFd) -> Result<Arc<Self>> {
        let fd = kernel
            .duplicate(iommufd.as_raw_fd())
            .doing(|| "keeping the iommufd of a DMA window open".into())?;
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        contexts.retain(|context| context.strong_count() != 0);
        let mut identified = kernel.same_file(fd.as_fd(), fd.as_fd()) == Some(true);
        for context in contexts.iter().filter_map(Weak::upgrade) {
            match kernel.same_file(fd.as_fd(), context.fd.as_fd()) {
                Some(true) => return Ok(context),
                Some(false) => {}
                None => identified = false,
            }
        }
        let context = Arc::new(Self {
            kernel: kernel.clone(),
            fd,
            compat: identified.then(Mutex::default),
            cuts: AtomicBool::new(false),
            claims: Mutex::default(),
        });
        contexts.push(Arc::downgrade(&context));
        Ok(context)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unmaps `iovas`, of which the first page and so many bytes are mapped, and cuts areas that reach beyond.
    ///
    /// On failure areas may be split (which changes nothing for devices), and areas at the front may
    /// be gone.
    pub(super) fn cut(
        &self,
        ioas: Ioas,
        iovas: Span<Iova>,
        mapped_bytes: u64,
        counters: &BlockCounters,
    ) -> CallResult<()> {
        let own = self.compat.as_ref();
        // Nobody else points the context anywhere while these are held.
        let _ours = own.map(|own| {
            let cuts = CUTS.read().unwrap_or_else(PoisonError::into_inner);
            (own.lock().unwrap_or_else(PoisonError::into_inner), cuts)
        });
        let _all = own
            .is_none()
            .then(|| CUTS.write().unwrap_or_else(PoisonError::into_inner));
        counters.set_calls.add(1);
        self.kernel.vfio_ioas_set(ioas)?;
        counters.cut_calls.add(1);
        let unmapped = self.kernel.vfio_unmap(ioas.iommufd, iovas)?;
        // Somebody outside this library may have pointed the context elsewhere for a moment, where there may be as
        // many bytes. One unmap goes to one IOAS: its first page, which was mapped, speaks for all.
        let first = Span::between(iovas.first(), iovas.first() + PAGE_SIZE);
        // More than was mapped here is somebody else's, too.
        if unmapped == mapped_bytes && !self.kernel.dma_is_mapped(ioas, first)? {
            return Ok(());
        }
        Err(CallError {
            call: "VFIO_IOMMU_UNMAP_DMA",
            errno: libc::ENOENT,
        })
    }

    /// Tries a cut at the first pages of `room`, which is the caller's and where nothing is mapped, on memory
    /// that is nobody's. What it returns is why areas in this IOAS can't be cut, if so.
    ///
    /// # Errors
    /// What no strategy would do better at: there is no such IOAS, the addresses are taken or
    /// reserved, memory can't be had or pinned, what was mapped can't be unmapped.
    pub(super) fn try_cut(&self, ioas: Ioas, room: Span<Iova>) -> Result<Option<Error>> {
        if self.has_huge_pages(ioas)? {
            let what = format!(
                "IOAS {} may have huge mappings, which can't be cut",
                ioas.id
            );
            return Ok(Some(Error::unsupported(what).with_remedy(
                "it has to be prepared before its first mapping (gmem_ioas_prepare)",
            )));
        }
        // One page is never cut.
        if self.cuts.load(Ordering::Relaxed) || room.size_bytes() < 2 * PAGE_SIZE {
            return Ok(None);
        }
        let iovas = Span::between(room.first(), room.first() + 2 * PAGE_SIZE);
        let doing = || format!("trying to cut a mapping at {iovas} of IOAS {}", ioas.id);
        let tried = self.cut_scratch(ioas, iovas).doing(doing)?;
        if tried.is_ok() {
            self.cuts.store(true, Ordering::Relaxed);
        }
        Ok(tried.doing(doing).err())
    }

    /// Whether mappings of an IOAS may be huge.
    ///
    /// # Errors
    /// ENOENT if there is no such IOAS, ENOTTY if the context is no iommufd's.
    fn has_huge_pages(&self, ioas: Ioas) -> Result<bool> {
        let found = self.look_at(ioas);
        found.doing(|| format!("looking for IOAS {} in its iommufd", ioas.id))
    }

    fn look_at(&self, ioas: Ioas) -> CallResult<bool> {
        let found = self.kernel.ioas_huge_pages(ioas);
        if found.as_ref().is_err_and(|call| call.errno == libc::ENOENT) {
            // So is all that was left there, and its number may be another's soon.
            self.forget(ioas.id);
        }
        found
    }

    /// Whether the context has this IOAS, which need not have a mapping.
    pub(super) fn check(&self, ioas: Ioas) -> Result<()> {
        self.has_huge_pages(ioas).map(drop)
    }

    /// Whether the IOAS is gone for certain, and with it all of its mappings.
    pub(super) fn has_lost(&self, ioas: Ioas) -> bool {
        let found = self.look_at(ioas);
        found.is_err_and(|call| call.errno == libc::ENOENT)
    }

    /// Whether the kernel has all of `iovas` mapped. Of a page, whose area goes as a whole if it goes,
    /// it says all about the area. An area is asked to be copied to where it is (IOMMU_IOAS_COPY): ENOENT says
    /// that it is not there (iopt_get_pages), EEXIST that it is (iopt_check_iova). Nothing is mapped or pinned
    /// for that, whatever has become of its memory.
    ///
    /// # Errors
    /// ENOENT if there is no such IOAS; else the kernel can't say, for want of memory.
    pub(super) fn is_mapped(&self, ioas: Ioas, iovas: Span<Iova>) -> CallResult<bool> {
        match self.kernel.dma_is_mapped(ioas, iovas)? {
            false if self.has_lost(ioas) => Err(CallError {
                call: "IOMMU_IOAS_COPY",
                errno: libc::ENOENT,
            }),
            mapped => Ok(mapped),
        }
    }

    /// Unmaps what is nobody else's.
    fn unmap_own(&self, ioas: Ioas, iovas: Span<Iova>) -> CallResult<()> {
        let mut unmapped = Ok(());
        for _ in 0..TRIALS {
            unmapped = self.kernel.dma_unmap(ioas, iovas);
            match &unmapped {
                Ok(()) => break,
                // All of it went, or the IOAS did, whatever an earlier call has said.
                Err(call) if call.errno == libc::ENOENT => return Ok(()),
                Err(_) => {}
            }
        }
        unmapped
    }

    /// Tries again to unmap what has been left at `iovas`, whole areas, where nobody was to map anything since. If
    /// somebody has, in an IOAS that got the number of the one in which it was, that stays, as far as it can be told:
    /// areas go from the front, so where the last page is not mapped it is not what was left.
    pub(super) fn clear(&self, ioas: Ioas, iovas: Span<Iova>) -> Result<()> {
        let last = Span::between(iovas.end() - PAGE_SIZE, iovas.end());
        let unmapped = match self.kernel.dma_is_mapped(ioas, last) {
            Ok(true) => self.unmap_own(ioas, iovas),
            asked => asked.map(drop),
        };
        unmapped.doing(|| {
            format!(
                "taking what an earlier call would not out of IOAS {} at {iovas}: a page of no meaning, or what \
                 a DMA window left",
                ioas.id
            )
        })
    }

    /// Fails if not even the first map works, or the last unmap; else the result of the trial.
    fn cut_scratch(&self, ioas: Ioas, iovas: Span<Iova>) -> CallResult<CallResult<()>> {
        let bytes = iovas.size_bytes();
        let scratch = self.kernel.create_memfd("gmem: trying a cut", bytes)?;
        // None of this is done for a mapping of the block, whose counts say what became of it.
        let counters = &BlockCounters::default();
        let map = |offsets: Span<Offset>| {
            let at = Iova(iovas.first() + offsets.first());
            let access = DeviceAccess::ReadWrite;
            self.kernel
                .dma_map_file(ioas, scratch.as_fd(), offsets, at, access)
        };
        let second = Span::between(iovas.first() + PAGE_SIZE, iovas.end());
        map(Span::between(0, bytes))?;
        let mut tried = self.cut(ioas, second, PAGE_SIZE, counters);
        for _ in 1..TRIALS {
            if !tried.as_ref().is_err_and(|call| may_pass(call.errno)) {
                break;
            }
            // It may be gone all the same; EEXIST says that it is not.
            let _ = map(Span::between(PAGE_SIZE, bytes));
            tried = self.cut(ioas, second, PAGE_SIZE, counters);
        }
        let tried = tried.and_then(|()| map(Span::between(PAGE_SIZE, bytes)));
        if let Err(call) = self.unmap_own(ioas, iovas) {
            let first = Span::between(iovas.first(), second.first());
            let left = [first, second].into_iter().filter(|&page| {
                // Where nobody can tell, it may be.
                self.kernel.dma_is_mapped(ioas, page).unwrap_or(true)
            });
            let left: Spans<Iova> = left.collect();
            if left.is_empty() {
                return Ok(tried);
            }
            limited!(
                error,
                "a page of no meaning stays mapped at {iovas} of IOAS {}, where no DMA window can be before \
                 it is gone: {call}",
                ioas.id
            );
            self.bar(ioas, &left);
            return Err(call);
        }
        Ok(tried)
    }
}

/// Makes mappings of an IOAS such that any part of them can be unmapped by itself: pages are mapped
/// one by one in the IOMMU (IOMMU_OPTION_HUGE_PAGES: iopt_disable_large_pages). Windows of
/// confidential blocks then take the strategy *cut*.
///
/// To be called when the IOAS is new: the kernel refuses it (EINVAL) once a device is attached and
/// anything is mapped. Takes no lock of the library.
pub(super) fn prepare(kernel: &dyn Kernel, iommufd: BorrowedFd, ioas_id: u32) -> Result<()> {
    let doing = || "turning huge pages off".into();
    let ioas = Ioas {
        iommufd,
        id: ioas_id,
    };
    kernel.ioas_disable_huge_pages(ioas).doing(doing)
}
