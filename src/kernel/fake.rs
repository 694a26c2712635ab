// SPDX-License-Identifier: MIT OR Apache-2.0
//! A kernel in memory that keeps the real one's rules and fails on demand.
//!
//! It is for failing calls on purpose and for watching their order; that the library works is shown
//! by running it on the real one. Files are real memfds, so that mappings are real; which pages have
//! memory, attributes and IOASes are books kept here.

use super::abi::*;
use super::abi_coming::GUEST_MEMFD_FLAG_CONTESTED;
use super::linux::Linux;
use super::{
    CallError, CallResult, DeviceAccess, Ioas, Kernel, Mapping, NumaPolicy, Outsider, Stopped,
};
use crate::attributes::Attribute;
use crate::units::{Address, Gpa, Iova, Offset, Span, PAGE_SIZE};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

/// What the fake VM's capabilities answer.
#[derive(Clone, Copy, Debug)]
pub enum VmKind {
    /// As an ordinary VM on Linux 7.3.
    Ordinary,
    /// As KVM_X86_SW_PROTECTED_VM on Linux 7.3.
    Confidential,
    /// As KVM_X86_SW_PROTECTED_VM on a kernel that converts in place and has no other way, with huge
    /// pages in guest_memfds.
    InPlace,
    /// The same on a kernel that keeps no attributes per VM and was told not to convert in place.
    SwitchedOff,
    /// As an ordinary VM on a kernel before guest_memfd.
    Old,
}

/// What flag bit 2 of KVM_CREATE_GUEST_MEMFD means to the kernel, which three series claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contested {
    /// Nothing: it is refused.
    Nothing,
    /// Huge pages.
    HugePages,
    /// Files that write(2) can fill.
    Write,
    /// Memory that is out of the kernel's direct map.
    NoDirectMap,
    /// Something that nobody has heard of.
    Other,
}

/// Which calls are to fail.
#[derive(Clone, Copy, Debug)]
pub struct Failures {
    /// The first one, counted from 0 from now on.
    pub first: usize,
    /// How many after it, it included; `usize::MAX` for all.
    pub count: usize,
    /// With what.
    pub errno: i32,
}

type Hook = Box<dyn Fn(&'static str) + Send + Sync>;

/// With what a call is to fail, by its name.
type Pick = Box<dyn Fn(&'static str) -> Option<i32> + Send>;

/// The kernel in memory.
pub struct FakeKernel {
    kind: Mutex<VmKind>,
    state: Mutex<State>,
    hook: Option<Hook>,
}

impl std::fmt::Debug for FakeKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FakeKernel({:?})", self.kind())
    }
}

#[derive(Default)]
struct State {
    files: HashMap<RawFd, File>,
    /// Address of a mapping to the file behind it.
    mappings: HashMap<usize, RawFd>,
    private_gpas: BTreeSet<u64>,
    slots: Vec<Slot>,
    ioases: HashMap<u32, BTreeMap<u64, Area>>,
    transparent_huge_page: Option<u64>,
    /// If it isn't 4 KiB.
    host_page_size: Option<u64>,
    /// Threads and mappings that have a NUMA policy.
    policy_threads: HashSet<ThreadId>,
    policy_mappings: HashSet<usize>,
    /// IOASes whose areas can be cut.
    no_huge_pages: BTreeSet<u32>,
    /// Where the VFIO-compatible unmap goes.
    compat_ioas: Option<u32>,
    calls: Vec<&'static str>,
    asked: Vec<Span<Offset>>,
    /// Huge pages in the host's pool, taken ones included.
    pool: usize,
    failures: Option<Failures>,
    pick: Option<Pick>,
    counted: usize,
    violations: Vec<String>,
    /// Pages of guest_memfds that somebody holds who is no device of an IOAS, and how many more
    /// conversions are to find them held.
    held: BTreeMap<(RawFd, u64), usize>,
    /// Whether MAP_FILE takes guest_memfds.
    maps_guest_memfds: bool,
    /// If it isn't what the VM's kind says.
    contested: Option<Contested>,
    /// Pages whose memory the hardware has lost.
    lost: BTreeSet<(RawFd, u64)>,
    /// How many private runs each guest_memfd had whose number was given to another file.
    runs_at_close: Vec<usize>,
    /// Pages whose bytes the guest can do without.
    given_up: BTreeSet<(RawFd, u64)>,
    /// Nobody is told whether two file descriptors are one file.
    refuses_kcmp: bool,
    /// IOASes unmap nothing.
    refuses_unmaps: bool,
    /// IOASes that there are no more.
    destroyed: BTreeSet<u32>,
}

#[derive(Clone, Default)]
struct File {
    is_guest_memfd: bool,
    /// If it has the flag that is contested, what that means.
    contested: Option<Contested>,
    /// Of the file behind, by which a closed one is known: its number may be another's.
    inode: u64,
    /// Private pages, where they convert in place.
    private: BTreeSet<u64>,
    /// Bytes of a huge page if it has them.
    huge_page: Option<u64>,
    /// Size of the huge pages that it gets where a whole one is populated at once, and the offsets of
    /// those it has. Punching a part of one frees nothing: a device may have it pinned, and then it
    /// can't be split.
    transparent: Option<(u64, BTreeSet<u64>)>,
    /// With huge pages: all pages of those that are there.
    pages: BTreeSet<u64>,
    /// Those that came by no NUMA policy.
    stray: BTreeSet<u64>,
}

impl File {
    fn private_runs(&self) -> usize {
        let begins = |page: &&u64| **page == 0 || !self.private.contains(&(**page - PAGE_SIZE));
        self.private.iter().filter(begins).count()
    }

    /// Whole huge pages of `span` that have no memory yet get it as such.
    fn make_huge(&mut self, span: Span<Offset>) {
        let Some((size, huge)) = &mut self.transparent else {
            return;
        };
        for first in (span.first().next_multiple_of(*size)..).step_by(*size as usize) {
            if first + *size > span.end() {
                break;
            }
            if self.pages.range(first..first + *size).next().is_none() {
                huge.insert(first);
            }
        }
    }

    /// Strikes out the huge pages that lie in `span`; answers those that have a part in it.
    fn keep_huge(&mut self, span: Span<Offset>) -> Vec<std::ops::Range<u64>> {
        let Some((size, huge)) = &mut self.transparent else {
            return Vec::new();
        };
        let size = *size;
        huge.retain(|&first| first < span.first() || first + size > span.end());
        let overlaps = |&&first: &&u64| first < span.end() && first + size > span.first();
        let kept = huge.iter().filter(overlaps);
        kept.map(|&first| first..first + size).collect()
    }
    fn allocate(&mut self, span: Span<Offset>) {
        let span = self.huge_page.map_or(span, |page| span.hull(page));
        self.pages.extend(pages(span.first(), span.end()));
    }
}

#[derive(Clone, Copy)]
struct Area {
    end: u64,
    file: RawFd,
    offset: u64,
}

struct Slot {
    gpas: Span<Gpa>,
    file: RawFd,
    offset: u64,
}

/// Private addresses, pages with memory and private pages by file, and for each IOAS and IOVA of a
/// page the offset that a device finds there: for comparing before and after. How areas divide the
/// IOVAs is not in it, since a cut that is undone leaves them divided.
pub type Snapshot = (
    BTreeSet<u64>,
    Vec<(RawFd, BTreeSet<u64>, BTreeSet<u64>)>,
    Vec<(u32, u64, u64)>,
);

fn pages(first: u64, end: u64) -> impl Iterator<Item = u64> {
    (first..end).step_by(PAGE_SIZE as usize)
}

impl FakeKernel {
    /// A kernel whose VMs are of `kind`.
    pub fn new(kind: VmKind) -> Self {
        Self {
            kind: Mutex::new(kind),
            state: Mutex::default(),
            hook: None,
        }
    }

    /// The same, calling `hook` with its name at the start of every call, no lock held.
    pub fn with_hook(kind: VmKind, hook: impl Fn(&'static str) + Send + Sync + 'static) -> Self {
        Self {
            hook: Some(Box::new(hook)),
            ..Self::new(kind)
        }
    }

    fn kind(&self) -> VmKind {
        *self.kind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// VMs are of `kind` from now on.
    pub fn set_kind(&self, kind: VmKind) {
        *self.kind.lock().unwrap_or_else(PoisonError::into_inner) = kind;
    }

    /// Has the kernel give memfds huge pages of so many bytes by itself.
    pub fn set_transparent_huge_page(&self, bytes: u64) {
        self.state().transparent_huge_page = Some(bytes);
    }

    /// Has pages be of so many bytes.
    pub fn set_host_page_size(&self, bytes: u64) {
        self.state().host_page_size = Some(bytes);
    }

    /// Has somebody hold a page of a guest_memfd: the next `conversions` to private that find it fail
    /// with EAGAIN.
    pub fn hold(&self, file: BorrowedFd, offset: u64, conversions: usize) {
        let page = (file.as_raw_fd(), offset);
        self.state().held.insert(page, conversions);
    }

    /// The opposite.
    pub fn let_go(&self) {
        self.state().held.clear();
    }

    /// Whether a file's memory is out of the kernel's direct map.
    pub fn is_out_of_direct_map(&self, file: BorrowedFd) -> bool {
        let state = self.state();
        state.files[&file.as_raw_fd()].contested == Some(Contested::NoDirectMap)
    }

    /// The hardware loses the memory of the page at `offset` of a file: nobody can pin it any more, and
    /// who converts it makes a violation. A hole punched there ends it.
    pub fn lose(&self, file: BorrowedFd, offset: u64) {
        self.state().lost.insert((file.as_raw_fd(), offset));
    }

    /// From now on the guest can do without the bytes of these pages: whoever frees them does no wrong.
    pub fn give_up(&self, file: BorrowedFd, span: Span<Offset>) {
        let file = file.as_raw_fd();
        let pages = pages(span.first(), span.end()).map(|page| (file, page));
        self.state().given_up.extend(pages);
    }

    /// Sets what the contested flag means.
    pub fn set_contested(&self, meaning: Contested) {
        self.state().contested = Some(meaning);
    }

    fn contested(&self) -> Contested {
        let kind = self.kind();
        self.state().contested.unwrap_or(match kind {
            VmKind::InPlace => Contested::HugePages,
            _ => Contested::Nothing,
        })
    }

    /// Has MAP_FILE take shared pages of guest_memfds.
    pub fn map_guest_memfds(&self) {
        self.state().maps_guest_memfds = true;
    }

    /// Whether the page at `offset` of a guest_memfd is private, where pages convert in place.
    pub fn is_private_in(&self, file: BorrowedFd, offset: u64) -> bool {
        let state = self.state();
        let file = state.files.get(&file.as_raw_fd());
        file.is_some_and(|file| file.private.contains(&offset))
    }

    /// Gives the host's pool `pages` huge pages, of whatever size. There are none at first.
    pub fn set_pool(&self, pages: usize) {
        self.state().pool = pages;
    }

    /// Huge pages of the pool that no file has.
    pub fn pool_free(&self) -> usize {
        let state = self.state();
        state.pool - state.pool_taken()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts counting calls anew, and makes some fail.
    pub fn fail(&self, failures: Option<Failures>) {
        let mut state = self.state();
        state.failures = failures;
        state.pick = None;
        state.counted = 0;
        state.calls.clear();
        state.asked.clear();
    }

    /// Has calls fail with what `pick` answers to their names, until the next [`FakeKernel::fail`]. It
    /// must not call the kernel.
    pub fn fail_if(&self, pick: impl Fn(&'static str) -> Option<i32> + Send + 'static) {
        self.state().pick = Some(Box::new(pick));
    }

    /// The calls since [`FakeKernel::fail`], in order.
    pub fn calls(&self) -> Vec<&'static str> {
        self.state().calls.clone()
    }

    /// What conversions in place since then were asked for, in order.
    pub fn asked(&self) -> Vec<Span<Offset>> {
        self.state().asked.clone()
    }

    /// The VM's successor: it has no slots, and all of its addresses are shared.
    pub fn rebuild_vm(&self) {
        let mut state = self.state();
        state.slots.clear();
        state.private_gpas.clear();
    }

    /// Whether a file holds the VM alive, as a guest_memfd does.
    pub fn is_guest_memfd(&self, file: BorrowedFd) -> bool {
        let state = self.state();
        let file = state.files.get(&file.as_raw_fd());
        file.is_some_and(|file| file.is_guest_memfd)
    }

    /// The file that a mapping's addresses show, if they show one.
    pub fn mapped(&self, host: *mut u8) -> Option<RawFd> {
        self.state().mappings.get(&(host as usize)).copied()
    }

    /// A memory slot: pages of `gpas` that are shared come from `file` at `offset`. Lets the fake
    /// see which IOVAs show what a guest holds for private.
    pub fn add_slot(&self, gpas: Span<Gpa>, file: BorrowedFd, offset: u64) {
        self.state().slots.push(Slot {
            gpas,
            file: file.as_raw_fd(),
            offset,
        });
    }

    /// Pages of a file that have memory by no NUMA policy.
    pub fn stray_pages(&self, file: BorrowedFd) -> usize {
        let state = self.state();
        let file = &state.files[&file.as_raw_fd()];
        file.pages.intersection(&file.stray).count()
    }

    /// The opposite.
    pub fn remove_slot(&self, gpas: Span<Gpa>) {
        self.state().slots.retain(|slot| slot.gpas != gpas);
    }

    /// Whether the VM's attribute at `gpa` is private.
    pub fn is_private(&self, gpa: Gpa) -> bool {
        self.state().private_gpas.contains(&gpa.0)
    }

    /// Whether `file` has memory for the page at `offset`.
    pub fn has_memory(&self, file: BorrowedFd, offset: u64) -> bool {
        let state = self.state();
        let file = state.files.get(&file.as_raw_fd());
        file.is_some_and(|file| file.pages.contains(&offset))
    }

    /// The offset of `file` that a device finds at `iova`.
    pub fn device_sees(&self, ioas_id: u32, file: BorrowedFd, iova: u64) -> Option<u64> {
        let state = self.state();
        let areas = state.ioases.get(&ioas_id)?;
        let (&start, area) = areas.range(..=iova).next_back()?;
        (iova < area.end && area.file == file.as_raw_fd()).then(|| area.offset + (iova - start))
    }

    /// Areas in an IOAS.
    pub fn areas(&self, ioas_id: u32) -> usize {
        self.state().ioases.get(&ioas_id).map_or(0, BTreeMap::len)
    }

    /// Invariants that were broken at some moment: must be empty.
    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    /// How many private runs each guest_memfd had that was closed to make way for another file under
    /// its number.
    pub fn runs_at_close(&self) -> Vec<usize> {
        self.state().runs_at_close.clone()
    }

    /// Everything that a conversion may change.
    pub fn snapshot(&self) -> Snapshot {
        let state = self.state();
        let mut files: Vec<_> = state
            .files
            .iter()
            .filter(|(_, file)| !file.pages.is_empty() || !file.private.is_empty())
            .map(|(&fd, file)| (fd, file.pages.clone(), file.private.clone()))
            .collect();
        files.sort();
        let mut seen: Vec<_> = state
            .ioases
            .iter()
            .flat_map(|(&id, areas)| {
                areas.iter().flat_map(move |(&start, area)| {
                    let offset = area.offset;
                    pages(start, area.end).map(move |iova| (id, iova, offset + (iova - start)))
                })
            })
            .collect();
        seen.sort();
        (state.private_gpas.clone(), files, seen)
    }

    /// Destroys an IOAS, which unmaps all. Nobody gets its number.
    pub fn destroy_ioas(&self, id: u32) {
        let mut state = self.state();
        state.ioases.remove(&id);
        state.destroyed.insert(id);
        if state.compat_ioas == Some(id) {
            state.compat_ioas = None;
        }
    }

    /// Another one gets the number of one that has been destroyed.
    pub fn make_ioas(&self, id: u32) {
        self.state().destroyed.remove(&id);
    }

    /// Whether IOMMU_IOAS_UNMAP is EBUSY from now on, with nothing done.
    pub fn refuse_unmaps(&self, refuses: bool) {
        self.state().refuses_unmaps = refuses;
    }

    /// Whether kcmp(2) is refused from now on, as by a sandbox.
    pub fn refuse_kcmp(&self, refuses: bool) {
        self.state().refuses_kcmp = refuses;
    }

    /// Counts a call; fails it if it is one that is to fail.
    fn enter(&self, call: &'static str) -> CallResult<MutexGuard<'_, State>> {
        if let Some(hook) = &self.hook {
            hook(call);
        }
        let mut state = self.state();
        let number = state.counted;
        state.counted += 1;
        state.calls.push(call);
        if let Some(failures) = state.failures {
            if number >= failures.first && number - failures.first < failures.count {
                let errno = failures.errno;
                return Err(CallError { call, errno });
            }
        }
        if let Some(errno) = state.pick.as_ref().and_then(|pick| pick(call)) {
            return Err(CallError { call, errno });
        }
        Ok(state)
    }

    fn map_area(
        &self,
        call: &'static str,
        ioas: Ioas,
        file_of: impl FnOnce(&State) -> Option<RawFd>,
        span: Span<Offset>,
        iova: Iova,
    ) -> CallResult<()> {
        let mut state = self.enter(call)?;
        let (start, end) = (iova.get(), iova.get() + span.size_bytes());
        let Some(file) = file_of(&state) else {
            // Addresses without memory: other areas are looked for first.
            let errno = match state.has_area(ioas.id, start, end) {
                true => libc::EEXIST,
                false => libc::EFAULT,
            };
            return Err(failed(call, errno));
        };
        let by_file = call == "IOMMU_IOAS_MAP_FILE";
        if by_file && state.files[&file].is_guest_memfd && !state.maps_guest_memfds {
            return Err(failed(call, libc::EINVAL));
        }
        let private = &state.files[&file].private;
        if private.range(span.first()..span.end()).next().is_some() {
            return Err(failed(call, libc::EFAULT));
        }
        let lost = state.has_lost(file, span);
        if state.has_area(ioas.id, start, end) {
            return Err(failed(call, libc::EEXIST));
        }
        if lost {
            return Err(failed(call, libc::EFAULT));
        }
        let offset = span.first();
        let areas = state.ioases.entry(ioas.id).or_default();
        areas.insert(start, Area { end, file, offset });
        // A device pins what it maps, and pinning allocates.
        let allocated = state.allocate(call, file, span);
        if allocated.is_err() {
            let areas = state.ioases.entry(ioas.id).or_default();
            areas.remove(&start);
        }
        allocated
    }
}

/// Of the file that has this number now, if one has.
fn inode(fd: RawFd) -> Option<u64> {
    std::fs::metadata(format!("/proc/self/fd/{fd}"))
        .ok()
        .map(|file| file.ino())
}

fn failed(call: &'static str, errno: i32) -> CallError {
    CallError { call, errno }
}

impl State {
    fn check_ioas(&self, call: &'static str, id: u32) -> CallResult<()> {
        match self.destroyed.contains(&id) {
            true => Err(failed(call, libc::ENOENT)),
            false => Ok(()),
        }
    }

    fn pool_taken(&self) -> usize {
        let mut counted = HashSet::new();
        let taken = |(&fd, file): (&RawFd, &File)| {
            let page = file.huge_page? / PAGE_SIZE;
            let open = inode(fd) == Some(file.inode);
            (open && counted.insert(file.inode)).then_some(file.pages.len() / page as usize)
        };
        self.files.iter().filter_map(taken).sum()
    }

    /// Memory for `span` of a file: ENOSPC, and nothing done, where the pool is empty.
    fn allocate(&mut self, call: &'static str, file: RawFd, span: Span<Offset>) -> CallResult<()> {
        let known = self.files.get_mut(&file).expect("known file");
        let there = known.pages.range(span.first()..span.end()).count() as u64;
        if there == span.size_bytes() / PAGE_SIZE {
            return Ok(());
        }
        let before = known.pages.clone();
        known.allocate(span);
        let came: BTreeSet<u64> = known.pages.difference(&before).copied().collect();
        let huge = known.huge_page.is_some();
        if huge && self.pool_taken() > self.pool {
            self.files.get_mut(&file).expect("known file").pages = before;
            return Err(failed(call, libc::ENOSPC));
        }
        if !self.by_policy(call, file) {
            self.files
                .get_mut(&file)
                .expect("known file")
                .stray
                .extend(came);
        }
        Ok(())
    }

    /// Whether what `call` allocates comes by a policy: that of the mapping for page faults, that of
    /// the file where it has one (shmem takes its mapping's), else the thread's.
    fn by_policy(&self, call: &str, file: RawFd) -> bool {
        let mut mappings = self.mappings.iter();
        let mapped = mappings.any(|(host, &of)| of == file && self.policy_mappings.contains(host));
        let known = &self.files[&file];
        let keeps = known.huge_page.is_none() && !known.is_guest_memfd;
        let faults = call.starts_with("madvise") && !known.is_guest_memfd;
        let thread = std::thread::current().id();
        (mapped && (keeps || faults))
            || (call == "fallocate" && self.policy_threads.contains(&thread))
    }

    fn has_area(&self, ioas_id: u32, start: u64, end: u64) -> bool {
        let areas = self.ioases.get(&ioas_id);
        let last = areas.and_then(|areas| areas.range(..end).next_back());
        last.is_some_and(|(_, area)| area.end > start)
    }

    fn has_lost(&self, file: RawFd, span: Span<Offset>) -> bool {
        let mut lost = self.lost.range((file, span.first())..(file, span.end()));
        lost.next().is_some()
    }

    /// Notes every page of `span` that a guest holds for shared, unless that is to replace one.
    fn check_unused(&mut self, file: RawFd, span: Span<Offset>) {
        if self.has_lost(file, span) {
            return;
        }
        for slot in self.slots.iter().filter(|slot| slot.file == file) {
            let shown = Span::between(slot.offset, slot.offset + slot.gpas.size_bytes());
            let Some(part) = shown.intersection(&span) else {
                continue;
            };
            let gpas: Span<Gpa> = shown.translate(&part, slot.gpas.start());
            let has_bytes = |gpa: &u64| {
                let offset = part.first() + (gpa - gpas.first());
                self.files[&file].pages.contains(&offset)
                    && !self.given_up.contains(&(file, offset))
            };
            let is_private = |gpa: &u64| {
                let offset = part.first() + (gpa - gpas.first());
                self.private_gpas.contains(gpa) || self.files[&file].private.contains(&offset)
            };
            let lost = pages(gpas.first(), gpas.end())
                .filter(has_bytes)
                .find(|gpa| !is_private(gpa));
            if let Some(gpa) = lost {
                self.violations
                    .push(format!("shared page at gpa {gpa:#x} lost its bytes"));
            }
        }
    }

    /// The first page that somebody holds, who has seen one conversion more.
    fn find_held(&mut self, file: RawFd, first: u64, end: u64) -> Option<u64> {
        let mut held = self.held.range_mut((file, first)..(file, end));
        let (&(_, offset), left) = held.find(|(_, left)| **left != 0)?;
        *left -= 1;
        Some(offset)
    }

    /// Notes what some device reaches in a file's pages that become private.
    fn check_unmapped(&mut self, file: RawFd, first: u64, end: u64) {
        for (id, areas) in &self.ioases {
            for (&iova, area) in areas {
                let area_end = area.offset + (area.end - iova);
                if area.file == file && area.offset < end && first < area_end {
                    self.violations.push(format!(
                        "offsets {first:#x} to {end:#x} became private while IOAS {id} showed some \
                         at iova {iova:#x}"
                    ));
                }
            }
        }
    }

    /// Notes every page of `span` that some device reaches.
    fn check_unreachable(&mut self, span: Span<Gpa>) {
        for slot in &self.slots {
            let Some(part) = slot.gpas.intersection(&span) else {
                continue;
            };
            let first = slot.offset + (part.first() - slot.gpas.first());
            let end = first + part.size_bytes();
            for (id, areas) in &self.ioases {
                for (&iova, area) in areas {
                    let area_end = area.offset + (area.end - iova);
                    if area.file == slot.file && area.offset < end && first < area_end {
                        self.violations.push(format!(
                            "{part} became private while IOAS {id} showed it at iova {iova:#x}"
                        ));
                    }
                }
            }
        }
    }
}

impl Kernel for FakeKernel {
    fn duplicate(&self, fd: RawFd) -> CallResult<OwnedFd> {
        drop(self.enter("fcntl(F_DUPFD_CLOEXEC)")?);
        Linux.duplicate(fd)
    }

    fn is_vm(&self, _fd: BorrowedFd) -> bool {
        true
    }

    fn check_extension(&self, _vm: BorrowedFd, capability: i32) -> CallResult<i32> {
        drop(self.enter("KVM_CHECK_EXTENSION")?);
        let mmap = GUEST_MEMFD_FLAG_MMAP as i32;
        let init_shared = GUEST_MEMFD_FLAG_INIT_SHARED as i32;
        let contested = match self.contested() {
            Contested::Nothing => 0,
            _ => GUEST_MEMFD_FLAG_CONTESTED as i32,
        };
        let (guest_memfd, flags, attributes) = match self.kind() {
            VmKind::InPlace | VmKind::Ordinary => (1, mmap | init_shared, 0),
            VmKind::Confidential => (1, mmap, KVM_MEMORY_ATTRIBUTE_PRIVATE as i32),
            VmKind::SwitchedOff => (1, mmap, 0),
            VmKind::Old => (0, 0, 0),
        };
        Ok(match capability {
            KVM_CAP_USER_MEMORY2 | KVM_CAP_GUEST_MEMFD => guest_memfd,
            KVM_CAP_GUEST_MEMFD_FLAGS if guest_memfd != 0 => flags | contested,
            KVM_CAP_MEMORY_ATTRIBUTES => attributes,
            _ => 0,
        })
    }

    fn create_guest_memfd(
        &self,
        _vm: BorrowedFd,
        size: u64,
        flags: u64,
        page_order: u8,
    ) -> CallResult<OwnedFd> {
        const CALL: &str = "KVM_CREATE_GUEST_MEMFD";
        let meaning = self.contested();
        let mut state = self.enter(CALL)?;
        let contested = (flags & GUEST_MEMFD_FLAG_CONTESTED != 0).then_some(meaning);
        if contested == Some(Contested::Nothing) {
            return Err(failed(CALL, libc::EINVAL));
        }
        let huge = contested == Some(Contested::HugePages);
        let huge_page = huge.then(|| PAGE_SIZE << page_order);
        let shared = flags & GUEST_MEMFD_FLAG_INIT_SHARED != 0;
        let mut file = File {
            is_guest_memfd: true,
            contested,
            huge_page,
            ..File::default()
        };
        let known_order = [9, 18].contains(&page_order);
        if meaning == Contested::HugePages && huge != known_order {
            return Err(failed(CALL, libc::EINVAL));
        }
        if let Some(page) = huge_page {
            if shared || size % page != 0 {
                return Err(failed(CALL, libc::EINVAL));
            }
            // Its whole size is reserved: here, as good as taken.
            // Pages of 1 GiB are made of 512 others, lest every trial of them fill books of 1 GiB.
            let taken = size / page.min(2 << 20);
            if state.pool_taken() + taken as usize > state.pool {
                return Err(failed(CALL, libc::ENOMEM));
            }
            file.pages.extend(pages(0, size));
        }
        if matches!(self.kind(), VmKind::InPlace) && !shared {
            file.private.extend(pages(0, size));
        }
        let fd = Linux.create_memfd("fake guest_memfd", size)?;
        file.inode = inode(fd.as_raw_fd()).unwrap_or(0);
        state.files.insert(fd.as_raw_fd(), file);
        Ok(fd)
    }

    /// As the newest series does it in a file of single pages, all or nothing, and the work trees in
    /// one of huge pages, one after the other. A failure on demand strikes there when the first has
    /// converted, if there are more.
    fn convert_in_place(
        &self,
        file: BorrowedFd,
        span: Span<Offset>,
        attribute: Attribute,
    ) -> Result<(), Stopped> {
        const CALL: &str = "KVM_SET_MEMORY_ATTRIBUTES2";
        let entered = self.enter(CALL);
        let failure = entered.as_ref().err().cloned();
        drop(entered);
        let stopped = |errno, at| Stopped {
            call: failed(CALL, errno),
            at,
        };
        match self.kind() {
            VmKind::InPlace => {}
            _ => return Err(stopped(libc::ENOTTY, None)),
        }
        let mut state = self.state();
        state.asked.push(span);
        let fd = file.as_raw_fd();
        if state.has_lost(fd, span) {
            let text = format!("{CALL} of {span}, some of which is lost");
            state.violations.push(text);
        }
        let huge_page = state.files[&fd].huge_page;
        let step = huge_page.unwrap_or(span.size_bytes());
        let mut first = span.first();
        while first < span.end() {
            let end = match huge_page {
                Some(page) => span.end().min((first / page + 1) * page),
                None => span.end(),
            };
            if let Some(call) = &failure {
                if first != span.first() || span.size_bytes() <= step {
                    return Err(stopped(call.errno, Some(first)));
                }
            }
            if attribute == Attribute::Private {
                if let Some(at) = state.find_held(fd, first, end) {
                    return Err(stopped(libc::EAGAIN, Some(at)));
                }
                state.check_unmapped(fd, first, end);
            }
            let file = state.files.get_mut(&fd).expect("known file");
            for page in pages(first, end) {
                match attribute {
                    Attribute::Private => file.private.insert(page),
                    Attribute::Shared => file.private.remove(&page),
                };
            }
            first = end;
        }
        Ok(())
    }

    fn set_memory_attributes(
        &self,
        _vm: BorrowedFd,
        span: Span<Gpa>,
        attribute: Attribute,
    ) -> CallResult<()> {
        let mut state = self.enter("KVM_SET_MEMORY_ATTRIBUTES")?;
        match attribute {
            Attribute::Private => {
                state.check_unreachable(span);
                state.private_gpas.extend(pages(span.first(), span.end()));
            }
            Attribute::Shared => {
                for page in pages(span.first(), span.end()) {
                    state.private_gpas.remove(&page);
                }
            }
        }
        Ok(())
    }

    fn create_memfd(&self, name: &str, size: u64) -> CallResult<OwnedFd> {
        let mut state = self.enter("memfd_create")?;
        let file = Linux.create_memfd(name, size)?;
        state.files.insert(file.as_raw_fd(), File::default());
        Ok(file)
    }

    fn create_huge_memfd(&self, name: &str, size: u64, page: u64) -> CallResult<OwnedFd> {
        let mut state = self.enter("memfd_create(MFD_HUGETLB)")?;
        let file = Linux.create_memfd(name, size)?;
        state.files.insert(
            file.as_raw_fd(),
            File {
                huge_page: Some(page),
                inode: inode(file.as_raw_fd()).unwrap_or(0),
                ..File::default()
            },
        );
        Ok(file)
    }

    fn map(&self, file: BorrowedFd, size: u64, alignment: u64) -> CallResult<Mapping> {
        let mut state = self.enter("mmap")?;
        let mapping = Linux.map(file, size, alignment)?;
        state
            .mappings
            .insert(mapping.host() as usize, file.as_raw_fd());
        Ok(mapping)
    }

    fn hide(&self, mapping: &Mapping) -> CallResult<()> {
        let mut state = self.enter("mmap(MAP_FIXED)")?;
        Linux.hide(mapping)?;
        state.mappings.remove(&(mapping.host() as usize));
        state.policy_mappings.remove(&(mapping.host() as usize));
        Ok(())
    }

    fn map_over(&self, mapping: &Mapping, file: BorrowedFd) -> CallResult<()> {
        let mut state = self.enter("mmap(MAP_FIXED)")?;
        Linux.map_over(mapping, file)?;
        let host = mapping.host() as usize;
        state.mappings.insert(host, file.as_raw_fd());
        state.policy_mappings.remove(&host);
        Ok(())
    }

    fn replace(&self, number: BorrowedFd, by: BorrowedFd) -> CallResult<()> {
        let mut state = self.enter("dup3")?;
        Linux.replace(number, by)?;
        let number_of = number.as_raw_fd();
        state.lost.retain(|&(fd, _)| fd != number_of);
        if let Some(closed) = state.files.get(&number_of).filter(|f| f.is_guest_memfd) {
            let runs = closed.private_runs();
            state.runs_at_close.push(runs);
        }
        let file = state.files.get(&by.as_raw_fd()).cloned();
        let file = file.unwrap_or_default();
        state.files.insert(number.as_raw_fd(), file);
        Ok(())
    }

    fn set_mapping_policy(&self, mapping: &Mapping, _policy: &NumaPolicy) -> CallResult<()> {
        let mut state = self.enter("mbind")?;
        state.policy_mappings.insert(mapping.host() as usize);
        Ok(())
    }

    fn set_thread_policy(&self, _policy: &NumaPolicy) -> CallResult<()> {
        let mut state = self.enter("set_mempolicy")?;
        state.policy_threads.insert(std::thread::current().id());
        Ok(())
    }

    fn allocate(&self, file: BorrowedFd, span: Span<Offset>) -> CallResult<()> {
        let mut state = self.enter("fallocate")?;
        state.allocate("fallocate", file.as_raw_fd(), span)
    }

    fn punch_hole(&self, file: BorrowedFd, span: Span<Offset>) -> CallResult<()> {
        let mut state = self.enter("fallocate(PUNCH_HOLE)")?;
        // What tests see through the mapping.
        Linux.punch_hole(file, span)?;
        state.check_unused(file.as_raw_fd(), span);
        let replaced = (file.as_raw_fd(), span.first())..(file.as_raw_fd(), span.end());
        state.lost.retain(|page| !replaced.contains(page));
        let file = state.files.get_mut(&file.as_raw_fd()).expect("known file");
        let unit = file.huge_page.unwrap_or(PAGE_SIZE);
        let whole = span.first().next_multiple_of(unit)..span.end() / unit * unit;
        let kept = file.keep_huge(span);
        let kept = |page: u64| kept.iter().any(|huge| huge.contains(&page));
        file.pages
            .retain(|&page| !whole.contains(&page) || kept(page));
        Ok(())
    }

    fn page_size(&self, file: BorrowedFd) -> CallResult<u64> {
        let state = self.enter("fstat")?;
        Ok(state.files[&file.as_raw_fd()]
            .huge_page
            .unwrap_or(PAGE_SIZE))
    }

    fn write_page(&self, file: BorrowedFd) -> CallResult<()> {
        let state = self.enter("pwrite")?;
        match state.files[&file.as_raw_fd()].contested {
            Some(Contested::Write) => Ok(()),
            _ => Err(failed("pwrite", libc::EINVAL)),
        }
    }

    fn refer(&self, mapping: &Mapping) -> CallResult<()> {
        let state = self.enter("vmsplice")?;
        let file = &state.files[&state.mappings[&(mapping.host() as usize)]];
        match file.private.contains(&0) || file.contested == Some(Contested::NoDirectMap) {
            true => Err(failed("vmsplice", libc::EFAULT)),
            false => Ok(()),
        }
    }

    fn populate(&self, mapping: &Mapping, span: Span<Offset>) -> CallResult<()> {
        let mut state = self.enter("madvise(MADV_POPULATE_WRITE)")?;
        let file = state.mappings[&(mapping.host() as usize)];
        state
            .files
            .get_mut(&file)
            .expect("known file")
            .make_huge(span);
        state
            .allocate("madvise(MADV_POPULATE_WRITE)", file, span)
            // What a page fault says that finds the pool empty: SIGBUS.
            .map_err(|call| CallError {
                errno: libc::EFAULT,
                ..call
            })
    }

    fn forget_mapped(&self, mapping: &Mapping, span: Span<Offset>) -> CallResult<()> {
        let call = "madvise(MADV_DONTNEED_LOCKED)";
        let state = self.enter(call)?;
        let file = state.mappings.get(&(mapping.host() as usize));
        // madvise_dontneed_free_valid_vma(): in hugetlb memory only whole pages, but for the last one's end.
        let known = file.and_then(|file| state.files.get(file));
        let page = known.filter(|known| !known.is_guest_memfd);
        if let Some(page) = page.and_then(|known| known.huge_page) {
            if span.first() % page != 0 {
                return Err(CallError {
                    call,
                    errno: libc::EINVAL,
                });
            }
        }
        drop(state);
        Linux.forget_mapped(mapping, span)
    }

    fn dma_map_file(
        &self,
        ioas: Ioas,
        file: BorrowedFd,
        span: Span<Offset>,
        iova: Iova,
        _access: DeviceAccess,
    ) -> CallResult<()> {
        let file = file.as_raw_fd();
        self.map_area("IOMMU_IOAS_MAP_FILE", ioas, |_| Some(file), span, iova)
    }

    fn dma_map_address(
        &self,
        ioas: Ioas,
        mapping: &Mapping,
        span: Span<Offset>,
        iova: Iova,
        _access: DeviceAccess,
    ) -> CallResult<()> {
        let host = mapping.host() as usize;
        let file_of = |state: &State| state.mappings.get(&host).copied();
        self.map_area("IOMMU_IOAS_MAP", ioas, file_of, span, iova)
    }

    fn dma_is_mapped(&self, ioas: Ioas, span: Span<Iova>) -> CallResult<bool> {
        let state = self.enter("IOMMU_IOAS_COPY")?;
        let Some(areas) = state.ioases.get(&ioas.id) else {
            return Ok(false);
        };
        let mapped = |iova: u64| {
            let area = areas.range(..=iova).next_back();
            area.is_some_and(|(_, area)| iova < area.end)
        };
        Ok(pages(span.first(), span.end()).all(mapped))
    }

    fn in_place_is_switched_off(&self) -> bool {
        matches!(self.kind(), VmKind::SwitchedOff)
    }

    fn host_page_size(&self) -> u64 {
        self.state().host_page_size.unwrap_or(PAGE_SIZE)
    }

    fn transparent_huge_page(&self) -> Option<u64> {
        self.state().transparent_huge_page
    }

    fn advise_huge_pages(&self, mapping: &Mapping) -> CallResult<()> {
        let mut state = self.enter("madvise(MADV_HUGEPAGE)")?;
        let file = state.mappings[&(mapping.host() as usize)];
        let size = state.transparent_huge_page;
        let file = state.files.get_mut(&file).expect("known file");
        file.transparent = size.map(|size| (size, BTreeSet::new()));
        Ok(())
    }

    fn keep_from(&self, _mapping: &Mapping, whom: Outsider) -> CallResult<()> {
        let call = match whom {
            Outsider::Children => "madvise(MADV_DONTFORK)",
            Outsider::CoreDumps => "madvise(MADV_DONTDUMP)",
        };
        self.enter(call).map(drop)
    }

    fn same_file(&self, one: BorrowedFd, other: BorrowedFd) -> Option<bool> {
        if self.state().refuses_kcmp {
            return None;
        }
        Linux.same_file(one, other)
    }

    fn ioas_huge_pages(&self, ioas: Ioas) -> CallResult<bool> {
        let state = self.enter("IOMMU_OPTION")?;
        state.check_ioas("IOMMU_OPTION", ioas.id)?;
        Ok(!state.no_huge_pages.contains(&ioas.id))
    }

    fn ioas_disable_huge_pages(&self, ioas: Ioas) -> CallResult<()> {
        const CALL: &str = "IOMMU_OPTION";
        let mut state = self.enter(CALL)?;
        let empty = state.ioases.get(&ioas.id).is_none_or(BTreeMap::is_empty);
        if !empty && !state.no_huge_pages.contains(&ioas.id) {
            return Err(failed(CALL, libc::EINVAL));
        }
        state.no_huge_pages.insert(ioas.id);
        Ok(())
    }

    fn vfio_ioas_set(&self, ioas: Ioas) -> CallResult<()> {
        let mut state = self.enter("IOMMU_VFIO_IOAS")?;
        state.check_ioas("IOMMU_VFIO_IOAS", ioas.id)?;
        state.compat_ioas = Some(ioas.id);
        Ok(())
    }

    /// As iommufd_vfio_unmap_dma: areas are cut at both ends, then those in the range go. A failure
    /// on demand strikes when the cuts are made and the first of several areas is gone.
    fn vfio_unmap(&self, _iommufd: BorrowedFd, span: Span<Iova>) -> CallResult<u64> {
        const CALL: &str = "VFIO_IOMMU_UNMAP_DMA";
        let entered = self.enter(CALL);
        let failure = entered.as_ref().err().cloned();
        drop(entered);
        let mut state = self.state();
        let Some(id) = state.compat_ioas else {
            return Err(failed(CALL, libc::ENODEV));
        };
        let cuttable = state.no_huge_pages.contains(&id);
        let areas = state.ioases.entry(id).or_default();
        for at in [span.first(), span.end()] {
            let crossing = areas.range(..at).next_back().filter(|(_, a)| a.end > at);
            let Some((&start, &area)) = crossing else {
                continue;
            };
            if !cuttable {
                return Err(failed(CALL, libc::ENOENT));
            }
            areas.insert(start, Area { end: at, ..area });
            let offset = area.offset + (at - start);
            areas.insert(at, Area { offset, ..area });
        }
        let inside: Vec<u64> = areas
            .range(span.first()..span.end())
            .map(|(&start, _)| start)
            .collect();
        let going = match &failure {
            Some(_) => inside.len().saturating_sub(1).min(1),
            None => inside.len(),
        };
        let mut unmapped = 0;
        for start in &inside[..going] {
            if let Some(area) = areas.remove(start) {
                unmapped += area.end - start;
            }
        }
        failure.map_or(Ok(unmapped), Err)
    }

    /// As iopt_unmap_iova_range: areas go one by one from the front, until one reaches beyond the
    /// range. A failure on demand strikes after the first area is gone, the worst moment.
    fn dma_unmap(&self, ioas: Ioas, span: Span<Iova>) -> CallResult<()> {
        const CALL: &str = "IOMMU_IOAS_UNMAP";
        let entered = self.enter(CALL);
        let failure = entered.as_ref().err().cloned();
        drop(entered);
        let mut state = self.state();
        state.check_ioas(CALL, ioas.id)?;
        if state.refuses_unmaps {
            return Err(failed(CALL, libc::EBUSY));
        }
        let areas = state.ioases.entry(ioas.id).or_default();
        let mut removed = 0;
        loop {
            let next = areas
                .range(..span.end())
                .map(|(&start, area)| (start, area.end))
                .find(|&(_, end)| end > span.first());
            let Some((start, end)) = next else { break };
            if start < span.first() || end > span.end() {
                return Err(failed(CALL, libc::ENOENT));
            }
            if let (Some(failure), 1) = (&failure, removed) {
                return Err(failure.clone());
            }
            areas.remove(&start);
            removed += 1;
        }
        match (failure, removed) {
            (Some(failure), _) => Err(failure),
            (None, 0) => Err(failed(CALL, libc::ENOENT)),
            (None, _) => Ok(()),
        }
    }
}
