// SPDX-License-Identifier: MIT OR Apache-2.0
//! Conversions against an oracle and against a kernel that fails any call.
//!
//! The oracle is an array with one attribute per page. After every operation the library, the
//! fake kernel and the oracle must agree on every page: attribute, memory in either plane, and what
//! a device finds.

#[path = "common/max_request.rs"]
mod max_request;

use gmem::kernel::fake::{Failures, FakeKernel, Snapshot, VmKind};
use gmem::kernel::{Ioas, Kernel};
use gmem::{
    Attribute, Block, BlockConfig, BlockStats, Cause, DmaSplit, Gpa, Span, StrategyKind, Vm,
    Window, WindowConfig,
};
use proptest::prelude::*;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, OnceLock};
use std::time::Duration;

const PAGE: u64 = gmem::PAGE_SIZE;
/// Pages of each of the two blocks.
const PAGES: u64 = 16;
/// Where the blocks are bound: next to each other.
const BASE: u64 = 0x10_0000;
/// IOVAs differ from guest addresses, so that a mix-up shows.
const IOVA_BASE: u64 = 0x4000_0000;

/// Two blocks side by side, each shown in both of two IOASes.
struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    blocks: Vec<Arc<Block>>,
    windows: Vec<Vec<Window>>,
    oracle: Vec<Attribute>,
    /// Memory that pages leave is kept, of both planes.
    keeps: bool,
}

fn any_fd() -> std::fs::File {
    std::fs::File::open("/dev/null").unwrap()
}

/// The window that a block has in an IOAS.
fn all_of_block(number: u64, ioas_id: u32) -> WindowConfig {
    WindowConfig {
        ioas_id,
        offset: 0,
        length: PAGES * PAGE,
        iova: IOVA_BASE + number * PAGES * PAGE,
        readonly: false,
    }
}

impl Rig {
    /// Mapped page by page: the strategy with the most calls to fail.
    fn new(initial: Attribute) -> Self {
        Self::with_split(initial, DmaSplit::Page)
    }

    fn with_split(initial: Attribute, split: DmaSplit) -> Self {
        Self::with_kernel(FakeKernel::new(VmKind::Confidential), initial, split)
    }

    fn with_kernel(kernel: FakeKernel, initial: Attribute, split: DmaSplit) -> Self {
        Self::with_all(kernel, initial, split, false)
    }

    fn with_all(kernel: FakeKernel, initial: Attribute, split: DmaSplit, keeps: bool) -> Self {
        Self::bounded(kernel, initial, split, keeps, None)
    }

    /// With a `max_request` of so many pages.
    fn bounded(
        kernel: FakeKernel,
        initial: Attribute,
        split: DmaSplit,
        keeps: bool,
        most: Option<u64>,
    ) -> Self {
        let kernel = Arc::new(kernel);
        let fd = any_fd();
        if split == DmaSplit::Cut {
            for id in 0..2 {
                let iommufd = fd.as_fd();
                kernel
                    .ioas_disable_huge_pages(Ioas { iommufd, id })
                    .unwrap();
            }
        }
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let mut blocks = Vec::new();
        let mut windows = Vec::new();
        for number in 0..2 {
            let config = BlockConfig {
                dma_split: split,
                // As long as the test: it says itself when something is released.
                release_delay: if keeps {
                    Duration::from_secs(3600)
                } else {
                    Duration::ZERO
                },
                keeps_private: keeps,
                max_request: most.map(|pages| pages * PAGE),
                ..BlockConfig::confidential("ram", PAGES * PAGE, initial)
            };
            let block = Block::new(&vm, &config).unwrap();
            let at = number * PAGES * PAGE;
            let gpas = Span::new(Gpa(BASE + at), PAGES * PAGE).unwrap();
            kernel.add_slot(gpas, block.file(Attribute::Shared), 0);
            block.bind(0, PAGES * PAGE, BASE + at).unwrap().keep();
            windows.push(
                (0..2)
                    .map(|ioas_id| {
                        let config = all_of_block(number, ioas_id);
                        block.add_window(&fd, &config).unwrap()
                    })
                    .collect(),
            );
            blocks.push(block);
        }
        Self {
            kernel,
            vm,
            blocks,
            windows,
            oracle: vec![initial; 2 * PAGES as usize],
            keeps,
        }
    }

    fn convert(&mut self, first: u64, count: u64, attribute: Attribute) -> gmem::Result<()> {
        let result = self
            .vm
            .convert(BASE + first * PAGE, count * PAGE, attribute);
        if result.is_ok() {
            self.oracle[first as usize..(first + count) as usize].fill(attribute);
        }
        result
    }

    /// A request that may be for more than `most` pages: then nothing has changed.
    fn ask(&mut self, first: u64, count: u64, attribute: Attribute, most: Option<u64>) -> bool {
        let (blocks, oracle) = (self.blocks.clone(), self.oracle.clone());
        let asked = first..first + count;
        let convert = || self.convert(first, count, attribute);
        !max_request::check(&blocks, &oracle, asked, attribute, most, convert)
    }

    /// Whether a page that has an attribute has memory in the plane of the other.
    fn left(&self, page: u64, attribute: Attribute) -> bool {
        let block = &self.blocks[(page / PAGES) as usize];
        let other = match attribute {
            Attribute::Private => Attribute::Shared,
            Attribute::Shared => Attribute::Private,
        };
        self.kernel
            .has_memory(block.file(other), page % PAGES * PAGE)
    }

    /// The memory in a snapshot that pages have in the plane of their attribute, by file and offset.
    fn in_use(&self, snapshot: &Snapshot) -> Vec<(i32, u64)> {
        let mut used = Vec::new();
        for (page, &attribute) in self.oracle.iter().enumerate() {
            let file = self.blocks[page / PAGES as usize]
                .file(attribute)
                .as_raw_fd();
            let offset = page as u64 % PAGES * PAGE;
            let files = snapshot.1.iter().filter(|(number, ..)| *number == file);
            used.extend(files.flat_map(|(_, pages, _)| pages.get(&offset).map(|&at| (file, at))));
        }
        used
    }

    /// What was asked to be shared has memory when the request returns, wherever that came from.
    fn check_reserved(&self, first: u64, count: u64) {
        for page in first..first + count {
            let block = &self.blocks[(page / PAGES) as usize];
            let shared = block.file(Attribute::Shared);
            assert!(
                self.kernel.has_memory(shared, page % PAGES * PAGE),
                "page {page}"
            );
        }
    }

    /// Releases what is kept: nothing is held twice any more.
    fn release(&mut self) {
        self.blocks.iter().for_each(|block| block.release_pending());
        for (number, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.stats().double_bytes, 0);
            for page in (number as u64 * PAGES..).take(PAGES as usize) {
                let attribute = self.oracle[page as usize];
                assert!(!self.left(page, attribute), "page {page} after the release");
            }
        }
    }

    /// Every page, as library, kernel, planes and devices see it.
    fn check(&self) {
        assert_eq!(self.kernel.violations(), Vec::<String>::new());
        for (page, &attribute) in self.oracle.iter().enumerate() {
            let page = page as u64;
            let block = &self.blocks[(page / PAGES) as usize];
            let offset = page % PAGES * PAGE;
            let private = attribute == Attribute::Private;
            assert_eq!(block.run_at(offset).unwrap().0, attribute, "page {page}");
            let told = self.kernel.is_private(Gpa(BASE + page * PAGE));
            assert_eq!(told, private, "the kernel on page {page}");
            let left = self.left(page, attribute);
            assert!(
                !left || self.keeps,
                "page {page}, {attribute:?}, holds memory of the other kind"
            );
            for ioas_id in 0..2 {
                let seen = self.kernel.device_sees(
                    ioas_id,
                    block.file(Attribute::Shared),
                    IOVA_BASE + page * PAGE,
                );
                assert_eq!(
                    seen,
                    (!private).then_some(offset),
                    "page {page} in IOAS {ioas_id}"
                );
            }
        }
        for (number, block) in self.blocks.iter().enumerate() {
            let pages = (number as u64 * PAGES..).take(PAGES as usize);
            let left = pages.filter(|&page| self.left(page, self.oracle[page as usize]));
            assert!(left.count() as u64 * PAGE <= block.stats().double_bytes);
            let mine = &self.oracle[number * PAGES as usize..][..PAGES as usize];
            let private = mine.iter().filter(|&&a| a == Attribute::Private).count() as u64;
            let stats = block.stats();
            assert_eq!(stats.bytes_private, private * PAGE);
            assert_eq!(stats.bytes_shared, (PAGES - private) * PAGE);
            assert_eq!(stats.bytes_dma_mapped, 2 * stats.bytes_shared);
            assert_eq!(stats.bytes_quarantined, 0);
            for page in 0..PAGES {
                let found = block.max_order(page * PAGE + 1).unwrap();
                assert_eq!(found, max_order(mine, page as usize), "page {page}");
            }
        }
    }
}

/// By trying every order.
fn max_order(pages: &[Attribute], page: usize) -> u32 {
    let alike = |order: &u32| {
        let first = page >> order << order;
        let range = pages.get(first..first + (1 << order));
        range.is_some_and(|range| range.iter().all(|a| *a == pages[page]))
    };
    (0..16).filter(alike).max().unwrap()
}

/// The counters that a failed conversion may not move.
fn state_of(stats: &BlockStats) -> [u64; 6] {
    [
        stats.bytes_private,
        stats.bytes_shared,
        stats.bytes_dma_mapped,
        stats.bytes_quarantined,
        stats.runs,
        stats.to_private + stats.to_shared,
    ]
}

fn attribute() -> impl Strategy<Value = Attribute> {
    prop_oneof![Just(Attribute::Shared), Just(Attribute::Private)]
}

fn split() -> impl Strategy<Value = DmaSplit> {
    prop_oneof![
        Just(DmaSplit::Page),
        Just(DmaSplit::Cut),
        Just(DmaSplit::Unit(4 * PAGE))
    ]
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    (0..2 * PAGES).prop_flat_map(|first| (Just(first), 1..=2 * PAGES - first))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_sequence_of_conversions_ends_as_the_oracle_says(
        initial in attribute(),
        split in split(),
        keeps in any::<bool>(),
        most in max_request::bound(2 * PAGES),
        ops in prop::collection::vec((range(), attribute(), any::<bool>()), 1..40),
    ) {
        let kernel = FakeKernel::new(VmKind::Confidential);
        let mut rig = Rig::bounded(kernel, initial, split, keeps, most);
        for ((first, count), attribute, release) in ops {
            let done = rig.ask(first, count, attribute, most);
            rig.check();
            if done && attribute == Attribute::Shared {
                rig.check_reserved(first, count);
            }
            if release {
                rig.release();
                rig.check();
            }
        }
    }

    #[test]
    fn a_failure_anywhere_in_any_state_changes_nothing(
        initial in attribute(),
        split in split(),
        keeps in any::<bool>(),
        before in prop::collection::vec((range(), attribute()), 0..12),
        (first, count) in range(),
        attribute in attribute(),
        failing_call in 0..120usize,
    ) {
        let kernel = FakeKernel::new(VmKind::Confidential);
        let mut rig = Rig::with_all(kernel, initial, split, keeps);
        for ((first, count), attribute) in before {
            rig.convert(first, count, attribute).unwrap();
        }
        fails_cleanly(&mut rig, (first, count), attribute, failing_call);
    }
}

/// Fails one call of one conversion and checks that nothing changed; false when the conversion has
/// fewer calls that can fail it.
fn fails_cleanly(
    rig: &mut Rig,
    (first, count): (u64, u64),
    attribute: Attribute,
    failing_call: usize,
) -> bool {
    let snapshot = rig.kernel.snapshot();
    let stats: Vec<_> = rig.blocks.iter().map(|b| state_of(&b.stats())).collect();
    // For want of memory, what is kept would be released, and the call made again.
    let errno = if rig.keeps { libc::EIO } else { libc::ENOMEM };
    rig.kernel.fail(Some(Failures {
        first: failing_call,
        count: 1,
        errno,
    }));
    let result = rig.convert(first, count, attribute);
    let calls = rig.kernel.calls();
    rig.kernel.fail(None);
    let Err(error) = result else {
        // Nothing failed, or only the release of the plane that was left, which is counted.
        let released = calls.get(failing_call) == Some(&"fallocate(PUNCH_HOLE)");
        assert!(released || calls.len() <= failing_call, "{calls:?}");
        let counted: u64 = rig.blocks.iter().map(|b| b.stats().release_failures).sum();
        assert_eq!(counted, u64::from(released));
        return false;
    };
    assert_eq!(error.errno(), errno, "{error}");
    // A to-shared attempt may have left private memory alone and shared memory released: the
    // snapshot has all of it.
    let now = rig.kernel.snapshot();
    let used = |snapshot: &Snapshot| rig.in_use(snapshot);
    match rig.keeps {
        false => assert_eq!(now, snapshot, "call {failing_call}: {calls:?}"),
        // What was kept may be gone: nobody has it.
        true => assert_eq!(
            (&now.0, &now.2, used(&now)),
            (&snapshot.0, &snapshot.2, used(&snapshot)),
            "call {failing_call}: {calls:?}"
        ),
    }
    let after: Vec<_> = rig.blocks.iter().map(|b| state_of(&b.stats())).collect();
    assert_eq!(after, stats);
    rig.check();
    rig.convert(first, count, attribute).unwrap();
    rig.check();
    true
}

#[test]
fn every_step_of_every_plan_can_fail_and_is_undone() {
    // To private: a call for each block and window, since nothing is mapped between its runs, then the
    // kernel. A cut is three calls; by units, nothing is left of an area that would be mapped again.
    // To shared: a map for each area and window, which is what allocates, then the kernel.
    let cases = [
        (DmaSplit::Page, Attribute::Private, 2 * 2 + 1),
        (DmaSplit::Page, Attribute::Shared, 14 * 2 + 1),
        (DmaSplit::Cut, Attribute::Private, (2 + 2) * 3 + 1),
        (DmaSplit::Cut, Attribute::Shared, 3 * 2 + 1),
        (DmaSplit::Unit(4 * PAGE), Attribute::Private, 2 * 2 + 1),
        (DmaSplit::Unit(4 * PAGE), Attribute::Shared, 4 * 2 + 1),
    ];
    for (split, attribute, steps) in cases {
        let initial = match attribute {
            Attribute::Private => Attribute::Shared,
            Attribute::Shared => Attribute::Private,
        };
        let mut failed = 0;
        for call in 0.. {
            // Across both blocks, with a run in the middle that has the attribute already.
            let mut rig = Rig::with_split(initial, split);
            rig.convert(10, 2, attribute).unwrap();
            if !fails_cleanly(&mut rig, (8, 16), attribute, call) {
                break;
            }
            failed += 1;
        }
        assert_eq!(failed, steps, "to {attribute:?} by {split:?}");
    }
}

#[test]
fn a_call_that_is_interrupted_too_often_is_a_failure_like_any_other() {
    for attribute in [Attribute::Private, Attribute::Shared] {
        let initial = match attribute {
            Attribute::Private => Attribute::Shared,
            Attribute::Shared => Attribute::Private,
        };
        for first in 0.. {
            let mut rig = Rig::new(initial);
            rig.kernel.fail(Some(Failures {
                first,
                count: 1,
                errno: libc::EINTR,
            }));
            let result = rig.convert(PAGES - 2, 4, attribute);
            rig.kernel.fail(None);
            if result.is_ok() {
                break;
            }
            assert_eq!(result.unwrap_err().errno(), libc::EINTR);
            rig.check();
        }
    }
}

/// Calls to the kernel's step of making the first page of a rig private, it included.
fn calls_to_kernels_step(rig: &Rig) -> usize {
    // Each window lets go of it.
    rig.windows[0].len()
}

#[test]
fn a_page_that_is_held_for_a_moment_is_waited_for() {
    let mut rig = Rig::new(Attribute::Shared);
    rig.kernel.fail(Some(Failures {
        first: calls_to_kernels_step(&rig),
        count: 3,
        errno: libc::EAGAIN,
    }));
    rig.convert(0, 1, Attribute::Private).unwrap();
    let calls = rig.kernel.calls();
    rig.kernel.fail(None);
    let asked = |&&call: &&&str| call == "KVM_SET_MEMORY_ATTRIBUTES";
    assert_eq!(calls.iter().filter(asked).count(), 4, "{calls:?}");
    assert_eq!(rig.blocks[0].stats().retries, 3);
    rig.check();
}

#[test]
fn a_page_that_is_held_for_longer_is_an_error_and_nothing_changes() {
    let mut rig = Rig::new(Attribute::Shared);
    let first = calls_to_kernels_step(&rig);
    let mut failures = Failures {
        first,
        count: usize::MAX,
        errno: libc::EAGAIN,
    };
    rig.kernel.fail(Some(failures));
    rig.convert(0, 1, Attribute::Private).unwrap_err();
    // How often it asks: as often as it takes to fail, and no more, so that undoing works.
    failures.count = rig.blocks[0].stats().retries as usize + 1;
    assert!(failures.count > 5);
    let mut rig = Rig::new(Attribute::Shared);
    rig.kernel.fail(Some(failures));
    let start = std::time::Instant::now();
    let error = rig.convert(0, 1, Attribute::Private).unwrap_err();
    assert_eq!(error.errno(), libc::EAGAIN);
    assert!(start.elapsed() >= std::time::Duration::from_millis(100));
    rig.kernel.fail(None);
    rig.check();
    rig.convert(0, 1, Attribute::Private).unwrap();
    rig.check();
}

#[test]
fn when_undoing_fails_too_the_range_is_quarantined_and_the_vm_runs_on() {
    for call in 0..8 {
        let mut rig = Rig::new(Attribute::Shared);
        rig.kernel.fail(Some(Failures {
            first: call,
            count: usize::MAX,
            errno: libc::ENOMEM,
        }));
        let result = rig.convert(8, 16, Attribute::Private);
        rig.kernel.fail(None);
        if result.is_ok() {
            // Only the release of shared memory failed.
            continue;
        }
        assert!(rig.kernel.violations().is_empty());
        let quarantined: u64 = rig.blocks.iter().map(|b| b.stats().bytes_quarantined).sum();
        assert!(quarantined > 0, "call {call}");
        for page in 8..24 {
            let block = &rig.blocks[page / PAGES as usize];
            let offset = page as u64 % PAGES * PAGE;
            assert_eq!(block.run_at(offset).unwrap().0, Attribute::Shared);
            assert!(!rig.kernel.is_private(Gpa(BASE + page as u64 * PAGE)));
        }
        // The next conversion of the range ends it.
        rig.convert(8, 16, Attribute::Private).unwrap();
        rig.convert(8, 16, Attribute::Shared).unwrap();
        rig.check();
    }
}

/// What leads back to devices what they lost when undoing failed.
#[derive(Clone, Copy, Debug)]
enum Heal {
    /// A guest asks for what it has.
    Ask,
    Reset,
    NewWindow,
    Reshape,
}

const HEALS: [Heal; 4] = [Heal::Ask, Heal::Reset, Heal::NewWindow, Heal::Reshape];

impl Rig {
    fn heal(&mut self, way: Heal, initial: Attribute) -> gmem::Result<()> {
        let fd = any_fd();
        for number in 0..2 {
            let block = self.blocks[number].clone();
            let config = |ioas_id| all_of_block(number as u64, ioas_id);
            match way {
                Heal::Ask => {
                    let shared = |page: &u64| block.run_at(page * PAGE).unwrap().0;
                    let shared = (0..PAGES).filter(|page| shared(page) == Attribute::Shared);
                    for page in shared {
                        self.convert(number as u64 * PAGES + page, 1, Attribute::Shared)?;
                    }
                }
                Heal::Reset => {
                    block.reset()?;
                    let first = number * PAGES as usize;
                    self.oracle[first..first + PAGES as usize].fill(initial);
                }
                Heal::NewWindow => {
                    self.windows[number].remove(0).remove()?;
                    self.windows[number].insert(0, block.add_window(&fd, &config(0))?);
                }
                Heal::Reshape => {
                    for ioas_id in 0..2 {
                        let window = &self.windows[number][ioas_id as usize];
                        window.reshape(&config(ioas_id))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes the library's word for each page's attribute: undoing failed.
    fn learn(&mut self) {
        for (page, attribute) in self.oracle.iter_mut().enumerate() {
            let block = &self.blocks[page / PAGES as usize];
            let (found, _) = block.run_at(page as u64 % PAGES * PAGE).unwrap();
            let gpa = Gpa(BASE + page as u64 * PAGE);
            let private = found == Attribute::Private;
            assert_eq!(self.kernel.is_private(gpa), private, "page {page}");
            *attribute = found;
        }
    }

    /// Devices have every shared page. Behind a private one they may have left what the guest shared
    /// before, if the kernel refused to unmap it: that is quarantined.
    fn check_devices(&self) {
        assert_eq!(self.kernel.violations(), Vec::<String>::new());
        let mut kept = 0;
        for (at, seen) in seen_by_devices(self).into_iter().enumerate() {
            let page = at % self.oracle.len();
            match self.oracle[page] {
                Attribute::Shared => assert!(seen, "page {page}"),
                Attribute::Private => kept += u64::from(seen),
            }
        }
        let stats = self.blocks.iter().map(|block| block.stats());
        let quarantined: u64 = stats.clone().map(|stats| stats.bytes_quarantined).sum();
        let private: u64 = stats.map(|stats| stats.bytes_private).sum();
        assert!(kept * PAGE <= 2 * quarantined && quarantined <= private);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_failed_any_way_leads_back_to_devices(
        initial in attribute(),
        split in split(),
        before in prop::collection::vec((range(), attribute()), 0..6),
        (first, count) in range(),
        attribute in attribute(),
        failing_call in 0..40usize,
        failures in prop_oneof![1..60usize, Just(usize::MAX)],
        way in prop::sample::select(&HEALS[..]),
    ) {
        let mut rig = Rig::with_split(initial, split);
        for ((first, count), attribute) in before {
            rig.convert(first, count, attribute).unwrap();
        }
        rig.kernel.fail(Some(Failures {
            first: failing_call,
            count: failures,
            errno: libc::ENOMEM,
        }));
        let _ = rig.convert(first, count, attribute);
        rig.kernel.fail(None);
        rig.learn();
        rig.heal(way, initial).unwrap();
        rig.check_devices();
        for attribute in [Attribute::Shared, Attribute::Private, Attribute::Shared] {
            rig.convert(0, 2 * PAGES, attribute).unwrap();
            rig.check();
        }
    }
}

/// A cut that fails may have removed an area at the front of its range, which the books know as a part
/// of a larger one.
#[test]
fn what_a_cut_lost_of_an_area_is_found_missing() {
    let mut rig = Rig::with_split(Attribute::Shared, DmaSplit::Cut);
    for attribute in [Attribute::Private, Attribute::Shared] {
        rig.convert(0, 2, attribute).unwrap();
    }
    // The second page of the area of two, and the first one of the area behind it.
    rig.kernel.fail(Some(Failures {
        first: 1,
        count: usize::MAX,
        errno: libc::ENOMEM,
    }));
    rig.convert(1, 2, Attribute::Private).unwrap_err();
    rig.kernel.fail(None);
    rig.blocks[0].reset().unwrap();
    rig.check();
}

/// An unmap that fails may have worked, and by units it takes neighbours along. If the kernel doesn't tell
/// what it still maps either, they are not to be given up in silence.
#[test]
fn what_an_unmap_may_have_taken_along_is_quarantined_and_comes_back() {
    for attempt in 0..4 {
        let mut rig = Rig::with_split(Attribute::Shared, DmaSplit::Unit(4 * PAGE));
        rig.kernel.fail(Some(Failures {
            first: attempt,
            count: usize::MAX,
            errno: libc::ENOMEM,
        }));
        rig.convert(5, 1, Attribute::Private).unwrap_err();
        rig.kernel.fail(None);
        let seen = seen_by_devices(&rig);
        let lost = |&page: &usize| !seen[page] || !seen[page + rig.oracle.len()];
        let lost = (0..rig.oracle.len()).filter(lost).count() as u64;
        assert!(lost > 0);
        let quarantined = rig.blocks[0].stats().bytes_quarantined;
        assert!(
            lost * PAGE <= quarantined,
            "{lost} pages, {quarantined:#x} bytes"
        );
        // By nobody's doing.
        for minutes in 0..3 {
            rig.vm
                .look_after(std::time::Duration::from_secs(minutes * 60));
        }
        rig.check();
        rig.convert(5, 1, Attribute::Private).unwrap();
        rig.check();
    }
}

#[test]
fn a_shared_page_that_devices_lost_comes_back_by_any_way() {
    for way in HEALS {
        let mut rig = Rig::new(Attribute::Shared);
        let first = calls_to_kernels_step(&rig);
        let fail = |first| {
            Some(Failures {
                first,
                count: usize::MAX,
                errno: libc::ENOMEM,
            })
        };
        rig.kernel.fail(fail(first));
        rig.convert(0, 1, Attribute::Private).unwrap_err();
        assert_eq!(rig.blocks[0].stats().bytes_quarantined, PAGE);
        // Who asks is told when it does not work, and nothing changes.
        rig.kernel.fail(fail(0));
        if let Heal::Ask = way {
            let error = rig.convert(0, 4, Attribute::Shared).unwrap_err();
            assert_eq!(error.errno(), libc::ENOMEM, "{error}");
        }
        rig.kernel.fail(None);
        assert_eq!(rig.blocks[0].stats().bytes_quarantined, PAGE);
        rig.heal(way, Attribute::Shared).unwrap();
        assert_eq!(rig.blocks[0].stats().bytes_quarantined, 0, "{way:?}");
        rig.check();
    }
}

#[test]
fn a_device_lets_go_before_the_kernel_hears_and_gets_it_back_when_it_is_safe() {
    let mut rig = Rig::new(Attribute::Shared);
    rig.kernel.fail(None);
    rig.convert(0, 1, Attribute::Private).unwrap();
    assert_eq!(
        rig.kernel.calls(),
        [
            "IOMMU_IOAS_UNMAP",
            "IOMMU_IOAS_UNMAP",
            "KVM_SET_MEMORY_ATTRIBUTES",
            "fallocate(PUNCH_HOLE)"
        ]
    );
    rig.kernel.fail(None);
    rig.convert(0, 1, Attribute::Shared).unwrap();
    assert_eq!(
        rig.kernel.calls(),
        [
            "IOMMU_IOAS_MAP_FILE",
            "IOMMU_IOAS_MAP_FILE",
            "KVM_SET_MEMORY_ATTRIBUTES",
            "fallocate(PUNCH_HOLE)"
        ]
    );
}

#[test]
fn what_has_the_attribute_already_costs_nothing() {
    let mut rig = Rig::new(Attribute::Shared);
    rig.kernel.fail(None);
    rig.convert(0, 2 * PAGES, Attribute::Shared).unwrap();
    assert!(rig.kernel.calls().is_empty());
}

#[test]
fn one_call_tells_the_kernel_of_a_range_across_blocks() {
    let mut rig = Rig::new(Attribute::Shared);
    rig.convert(PAGES - 1, 1, Attribute::Private).unwrap();
    rig.kernel.fail(None);
    rig.convert(PAGES - 4, 8, Attribute::Private).unwrap();
    let calls = rig.kernel.calls();
    let told = calls.iter().filter(|&&c| c == "KVM_SET_MEMORY_ATTRIBUTES");
    assert_eq!(told.count(), 1, "{calls:?}");
    rig.check();
}

#[test]
fn senseless_requests_get_an_error_and_change_nothing() {
    let mut rig = Rig::new(Attribute::Shared);
    let end = BASE + 2 * PAGES * PAGE;
    for (gpa, size) in [
        (BASE, 0),
        (BASE + 1, PAGE),
        (BASE, PAGE / 2),
        (u64::MAX - PAGE + 1, PAGE),
        (BASE, u64::MAX - PAGE + 1),
        (end, PAGE),
        (end - PAGE, 2 * PAGE),
        (BASE - PAGE, 2 * PAGE),
        (0, 1 << 50),
    ] {
        let error = rig.vm.convert(gpa, size, Attribute::Private).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "{error}");
    }
    rig.check();
    // To shared, what is no memory is ignored: it is shared.
    rig.vm.convert(end, PAGE, Attribute::Shared).unwrap();
    rig.convert(0, 2, Attribute::Private).unwrap();
    rig.vm
        .convert(BASE - PAGE, 2 * PAGE, Attribute::Shared)
        .unwrap();
    rig.oracle[0] = Attribute::Shared;
    rig.check();
    assert_eq!(rig.vm.stats().failures, 9);
    assert_eq!(rig.vm.stats().ignored_bytes, 2 * PAGE);
}

#[test]
fn a_guest_can_not_make_the_books_grow_without_end() {
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let vm = Vm::with_kernel(kernel, any_fd()).unwrap();
    let config = BlockConfig {
        max_runs: Some(3),
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", 64 * PAGE, Attribute::Shared)
    };
    let block = Block::new(&vm, &config).unwrap();
    block.bind(0, 64 * PAGE, 0).unwrap().keep();
    for page in [0, 2, 4] {
        vm.convert(page * PAGE, PAGE, Attribute::Private).unwrap();
    }
    let error = vm.convert(6 * PAGE, PAGE, Attribute::Private).unwrap_err();
    assert_eq!(*error.cause(), Cause::MaxRuns { runs: 4, most: 3 });
    // What doesn't add a run goes on.
    vm.convert(5 * PAGE, PAGE, Attribute::Private).unwrap();
    vm.convert(0, 5 * PAGE, Attribute::Private).unwrap();
    assert_eq!(block.stats().runs, 1);
}

#[test]
fn bindings_come_and_go_with_their_attributes() {
    let mut rig = Rig::new(Attribute::Shared);
    rig.convert(2, 3, Attribute::Private).unwrap();
    let block = rig.blocks[0].clone();
    let length = PAGES * PAGE;
    block.unbind(0, length, BASE).unwrap();
    assert!(!rig.kernel.is_private(Gpa(BASE + 2 * PAGE)));
    assert_eq!(block.unbind(0, length, BASE).unwrap_err().errno(), 22);
    // Elsewhere, in two pieces; a second binding of an offset is refused.
    let elsewhere = 0x8000_0000;
    block.bind(0, 4 * PAGE, elsewhere).unwrap().keep();
    let twice = block.bind(3 * PAGE, PAGE, 0x9000_0000).unwrap_err();
    assert_eq!(twice.errno(), libc::EEXIST);
    block
        .bind(4 * PAGE, length - 4 * PAGE, elsewhere + 4 * PAGE)
        .unwrap()
        .keep();
    for page in 0..PAGES {
        let private = (2..5).contains(&page);
        assert_eq!(
            rig.kernel.is_private(Gpa(elsewhere + page * PAGE)),
            private,
            "page {page}"
        );
    }
    // A failing binding leaves none.
    block.unbind(0, 4 * PAGE, elsewhere).unwrap();
    rig.kernel.fail(Some(Failures {
        first: 0,
        count: 1,
        errno: libc::ENOMEM,
    }));
    let failed = block.bind(0, 4 * PAGE, elsewhere).unwrap_err();
    rig.kernel.fail(None);
    assert_eq!(failed.errno(), libc::ENOMEM);
    assert!(!rig.kernel.is_private(Gpa(elsewhere + 2 * PAGE)));
    block.bind(0, 4 * PAGE, elsewhere).unwrap().keep();
    assert!(rig.kernel.is_private(Gpa(elsewhere + 2 * PAGE)));
}

/// Else the books would say shared, whatever the guest asks for would cost nothing, and KVM would go on
/// looking for a private page.
#[test]
fn what_could_not_be_shared_at_the_end_of_a_binding_is_at_the_next_one() {
    let mut rig = Rig::new(Attribute::Shared);
    rig.convert(2, 3, Attribute::Private).unwrap();
    rig.convert(7, 1, Attribute::Private).unwrap();
    let private = |page: u64| rig.kernel.is_private(Gpa(BASE + page * PAGE));
    let fail = || {
        rig.kernel.fail(Some(Failures {
            first: 0,
            count: 1,
            errno: libc::ENOMEM,
        }));
    };
    fail();
    let failed = rig.blocks[0].unbind(0, PAGES * PAGE, BASE).unwrap_err();
    assert_eq!(failed.errno(), libc::ENOMEM);
    assert!(private(2) && private(7));
    let config = BlockConfig::confidential("other", 4 * PAGE, Attribute::Shared);
    let other = Block::new(&rig.vm, &config).unwrap();
    // As long as the kernel refuses, there is no binding.
    fail();
    let failed = other.bind(0, 4 * PAGE, BASE).unwrap_err();
    assert_eq!(failed.errno(), libc::ENOMEM);
    assert_eq!(other.stats().bindings, 0);
    other.bind(0, 4 * PAGE, BASE).unwrap().keep();
    let pages: Vec<bool> = (0..PAGES).map(private).collect();
    assert!(!pages[..4].contains(&true), "{pages:?}");
    other.unbind(0, 4 * PAGE, BASE).unwrap();
    // What was not bound again is known still, and once only.
    rig.blocks[0].bind(0, PAGES * PAGE, BASE).unwrap().keep();
    let pages: Vec<bool> = (0..PAGES).map(private).collect();
    let expected = |page| (2..5).contains(&page) || page == 7;
    assert_eq!(pages, (0..PAGES).map(expected).collect::<Vec<_>>());
    rig.blocks[0].unbind(0, PAGES * PAGE, BASE).unwrap();
    rig.kernel.fail(None);
    other.bind(0, 4 * PAGE, BASE).unwrap().keep();
    assert_eq!(rig.kernel.calls(), Vec::<&str>::new());
}

/// A binding that fails half-way, or a block that ends, tells the kernel so too, in vain perhaps.
#[test]
fn whoever_leaves_addresses_private_they_are_shared_at_the_next_binding() {
    for ends in [true, false] {
        let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
        let vm = Vm::with_kernel(kernel.clone(), any_fd()).unwrap();
        let config = BlockConfig::confidential("ram", 4 * PAGE, Attribute::Shared);
        let [block, other] = [(); 2].map(|()| Block::new(&vm, &config).unwrap());
        block.bind(0, 4 * PAGE, BASE).unwrap().keep();
        for page in [0, 2] {
            let gpa = BASE + page * PAGE;
            vm.convert(gpa, PAGE, Attribute::Private).unwrap();
        }
        if !ends {
            block.unbind(0, 4 * PAGE, BASE).unwrap();
        }
        kernel.fail(Some(Failures {
            first: usize::from(!ends),
            count: usize::MAX,
            errno: libc::ENOMEM,
        }));
        match ends {
            true => drop(block),
            false => drop(block.bind(0, 4 * PAGE, BASE).unwrap_err()),
        }
        kernel.fail(None);
        assert!(kernel.is_private(Gpa(BASE)));
        other.bind(0, 4 * PAGE, BASE).unwrap().keep();
        assert!(!kernel.is_private(Gpa(BASE)));
        assert!(!kernel.is_private(Gpa(BASE + 2 * PAGE)));
    }
}

#[test]
fn a_reset_gives_back_the_initial_attribute_everywhere() {
    for initial in [Attribute::Shared, Attribute::Private] {
        let mut rig = Rig::new(initial);
        for (first, attribute) in [(1, Attribute::Private), (3, Attribute::Shared)] {
            rig.convert(first, 2, attribute).unwrap();
            rig.convert(first + PAGES, 2, attribute).unwrap();
        }
        let gpas = Span::new(Gpa(BASE + PAGES * PAGE), PAGES * PAGE).unwrap();
        rig.blocks[1]
            .unbind(0, gpas.size_bytes(), gpas.first())
            .unwrap();
        rig.kernel.remove_slot(gpas);
        for block in &rig.blocks {
            block.reset().unwrap();
        }
        let file = rig.blocks[1].file(Attribute::Shared);
        rig.kernel.add_slot(gpas, file, 0);
        rig.blocks[1]
            .bind(0, gpas.size_bytes(), gpas.first())
            .unwrap()
            .keep();
        rig.oracle.fill(initial);
        rig.check();
    }
}

#[test]
fn windows_come_and_go_during_the_life_of_a_block() {
    let mut rig = Rig::new(Attribute::Shared);
    rig.convert(4, 4, Attribute::Private).unwrap();
    let block = rig.blocks[0].clone();
    let window = rig.windows[0].pop().unwrap();
    window.remove().unwrap();
    assert_eq!(
        rig.kernel
            .device_sees(1, block.file(Attribute::Shared), IOVA_BASE),
        None
    );
    assert_eq!(window.remove().unwrap_err().errno(), 22);
    rig.convert(0, 8, Attribute::Private).unwrap();
    // Over an IOVA range that something occupies: refused, and nothing of it stays.
    let fd = any_fd();
    let config = WindowConfig {
        ioas_id: 1,
        offset: 8 * PAGE,
        length: 8 * PAGE,
        iova: IOVA_BASE + (PAGES - 4) * PAGE,
        readonly: true,
    };
    let areas = rig.kernel.areas(1);
    let error = block.add_window(&fd, &config).unwrap_err();
    assert_eq!(error.errno(), libc::EEXIST, "{error}");
    assert_eq!(rig.kernel.areas(1), areas);
    let again = WindowConfig {
        offset: 0,
        length: PAGES * PAGE,
        iova: IOVA_BASE,
        ..config
    };
    block.add_window(&fd, &again).unwrap().keep();
    rig.check();
}

#[test]
fn a_window_keeps_what_its_old_and_new_part_have_in_common() {
    let mut rig = Rig::new(Attribute::Shared);
    rig.convert(6, 2, Attribute::Private).unwrap();
    let window = rig.windows[0].remove(0);
    let part = |first: u64, count: u64| WindowConfig {
        ioas_id: 0,
        offset: first * PAGE,
        length: count * PAGE,
        iova: IOVA_BASE + first * PAGE,
        readonly: false,
    };
    let seen = |rig: &Rig| -> Vec<u64> {
        let file = rig.blocks[0].file(Attribute::Shared);
        let sees = |page: &u64| rig.kernel.device_sees(0, file, IOVA_BASE + page * PAGE);
        (0..PAGES).filter(|page| sees(page).is_some()).collect()
    };
    rig.kernel.fail(None);
    window.reshape(&part(4, 8)).unwrap();
    assert_eq!(seen(&rig), [4, 5, 8, 9, 10, 11]);
    assert_eq!(rig.kernel.calls(), ["IOMMU_IOAS_UNMAP"; 2]);
    rig.kernel.fail(None);
    window.reshape(&part(2, 8)).unwrap();
    assert_eq!(seen(&rig), [2, 3, 4, 5, 8, 9]);
    let calls = rig.kernel.calls();
    let maps = calls.iter().filter(|&&c| c == "IOMMU_IOAS_MAP_FILE");
    assert_eq!((maps.count(), calls.len()), (2, 3), "{calls:?}");
    // Any failing call leaves the old view, or, when only unmapping failed, both.
    for call in 0..3 {
        rig.kernel.fail(Some(Failures {
            first: call,
            count: 1,
            errno: libc::ENOMEM,
        }));
        let error = window.reshape(&part(0, 6)).unwrap_err();
        rig.kernel.fail(None);
        assert_eq!(error.errno(), libc::ENOMEM);
        let both = [0, 1, 2, 3, 4, 5, 8, 9];
        assert_eq!(seen(&rig), if call < 2 { &both[2..] } else { &both });
    }
    // Conversions follow the view.
    window.reshape(&part(0, PAGES)).unwrap();
    rig.convert(0, 1, Attribute::Private).unwrap();
    rig.check();
    for wrong in [
        WindowConfig {
            iova: IOVA_BASE,
            ..part(4, 8)
        },
        WindowConfig {
            ioas_id: 1,
            ..part(4, 8)
        },
        WindowConfig {
            readonly: true,
            ..part(4, 8)
        },
        part(PAGES, 1),
    ] {
        let error = window.reshape(&wrong).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "{error}");
    }
    rig.check();
}

#[test]
fn a_window_that_fails_or_refuses_to_close_keeps_its_pages_from_becoming_private() {
    let rig = Rig::new(Attribute::Shared);
    let block = &rig.blocks[0];
    let window = &rig.windows[0][1];
    let all_fail = |first| {
        rig.kernel.fail(Some(Failures {
            first,
            count: usize::MAX,
            errno: libc::EBUSY,
        }));
    };
    all_fail(0);
    let error = window.remove().unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY, "{error}");
    assert_eq!(block.check_unused().unwrap_err().errno(), libc::EBUSY);
    // While the kernel refuses to unmap, the pages stay shared.
    let error = rig.vm.convert(BASE, PAGE, Attribute::Private).unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY, "{error}");
    rig.kernel.fail(None);
    rig.vm.convert(BASE, PAGE, Attribute::Private).unwrap();
    assert!(rig.kernel.violations().is_empty());
    // What is closing takes nothing in any more, and goes at the next try.
    rig.vm.convert(BASE, PAGE, Attribute::Shared).unwrap();
    let file = block.file(Attribute::Shared);
    assert_eq!(rig.kernel.device_sees(1, file, IOVA_BASE), None);
    window.remove().unwrap();
    // A window that can neither be opened nor taken back is in nobody's way either.
    let fd = any_fd();
    let config = WindowConfig {
        ioas_id: 2,
        offset: 0,
        length: PAGES * PAGE,
        iova: IOVA_BASE,
        readonly: false,
    };
    all_fail(4);
    block.add_window(&fd, &config).unwrap_err();
    let refused = rig.vm.convert(BASE, PAGE, Attribute::Private);
    rig.kernel.fail(None);
    assert_eq!(refused.unwrap_err().errno(), libc::EBUSY);
    rig.vm
        .convert(BASE, PAGES * PAGE, Attribute::Private)
        .unwrap();
    assert!(rig.kernel.violations().is_empty());
    assert_eq!(rig.kernel.areas(2), 0);
}

/// One block in two bindings with a hole between them, every second page private.
fn block_around_a_hole(kernel: &Arc<FakeKernel>) -> (Arc<Vm>, Arc<Block>) {
    let vm = Vm::with_kernel(kernel.clone(), any_fd()).unwrap();
    let config = BlockConfig::confidential("ram", 16 * PAGE, Attribute::Private);
    let block = Block::new(&vm, &config).unwrap();
    block.bind(0, 8 * PAGE, 0).unwrap().keep();
    block.bind(8 * PAGE, 8 * PAGE, 16 * PAGE).unwrap().keep();
    (vm, block)
}

#[test]
fn a_hole_never_gets_an_attribute() {
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let (vm, block) = block_around_a_hole(&kernel);
    vm.convert(2 * PAGE, PAGE, Attribute::Shared).unwrap();
    vm.convert(20 * PAGE, PAGE, Attribute::Shared).unwrap();
    block.reset().unwrap();
    for page in 0..24 {
        let bound = !(8..16).contains(&page);
        assert_eq!(kernel.is_private(Gpa(page * PAGE)), bound, "page {page}");
    }
    // A request to share across it leaves it alone, too.
    kernel.fail(None);
    vm.convert(0, 24 * PAGE, Attribute::Shared).unwrap();
    let calls = kernel.calls();
    let told = calls.iter().filter(|&&c| c == "KVM_SET_MEMORY_ATTRIBUTES");
    assert_eq!(told.count(), 2, "one on each side");
}

#[test]
fn undoing_the_kernels_step_changes_only_what_it_changed() {
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let (vm, block) = block_around_a_hole(&kernel);
    for page in [1, 3, 17, 19] {
        vm.convert(page * PAGE, PAGE, Attribute::Shared).unwrap();
    }
    let before = kernel.snapshot().0;
    kernel.fail(None);
    vm.convert(0, 24 * PAGE, Attribute::Shared).unwrap();
    let calls = kernel.calls();
    let second = calls
        .iter()
        .enumerate()
        .filter(|(_, &c)| c == "KVM_SET_MEMORY_ATTRIBUTES")
        .nth(1)
        .unwrap()
        .0;
    block.reset().unwrap();
    for page in [1, 3, 17, 19] {
        vm.convert(page * PAGE, PAGE, Attribute::Shared).unwrap();
    }
    kernel.fail(Some(Failures {
        first: second,
        count: 1,
        errno: libc::ENOMEM,
    }));
    let error = vm.convert(0, 24 * PAGE, Attribute::Shared).unwrap_err();
    kernel.fail(None);
    assert_eq!(error.errno(), libc::ENOMEM);
    assert_eq!(kernel.snapshot().0, before);
    for page in 0..16 {
        let (attribute, _) = block.run_at(page * PAGE).unwrap();
        let gpa = if page < 8 { page } else { page + 8 };
        let private = attribute == Attribute::Private;
        assert_eq!(kernel.is_private(Gpa(gpa * PAGE)), private, "page {page}");
    }
}

/// Of one call to the kernel some parts are led back, and some not: each for itself.
#[test]
fn what_is_led_back_well_is_not_quarantined_with_its_neighbours() {
    for failing in 0..3 {
        let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
        let (vm, block) = block_around_a_hole(&kernel);
        for page in [1, 3] {
            vm.convert(page * PAGE, PAGE, Attribute::Shared).unwrap();
        }
        // The second piece fails, and so does the way back of one run of the first: pages 0, 2, 4 to 7.
        let told = Arc::new(AtomicUsize::new(0));
        kernel.fail_if(move |call| {
            let asked = call == "KVM_SET_MEMORY_ATTRIBUTES";
            let number = told.fetch_add(usize::from(asked), Ordering::SeqCst);
            (asked && (number == 1 || number == 2 + failing)).then_some(libc::ENOMEM)
        });
        vm.convert(0, 24 * PAGE, Attribute::Shared).unwrap_err();
        kernel.fail(None);
        // Last first.
        let (first, pages) = [(4, 4), (2, 1), (0, 1)][failing];
        assert_eq!(block.stats().bytes_quarantined, pages * PAGE);
        for page in 0..8 {
            let is_left = (first..first + pages).contains(&page);
            let shared = is_left || [1, 3].contains(&page);
            assert_eq!(
                block.run_at(page * PAGE).unwrap().0 == Attribute::Shared,
                shared
            );
            assert_eq!(kernel.is_private(Gpa(page * PAGE)), !shared, "page {page}");
        }
        vm.convert(0, 8 * PAGE, Attribute::Private).unwrap();
        assert_eq!(block.stats().bytes_quarantined, 0);
    }
}

#[test]
fn a_convert_unit_may_be_bound_in_pieces() {
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let vm = Vm::with_kernel(kernel, any_fd()).unwrap();
    let config = BlockConfig {
        convert_unit: gmem::ConvertUnit::Bytes(4 * PAGE),
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", 16 * PAGE, Attribute::Shared)
    };
    let block = Block::new(&vm, &config).unwrap();
    block.bind(0, 3 * PAGE, 0).unwrap().keep();
    block.bind(3 * PAGE, 13 * PAGE, 3 * PAGE).unwrap().keep();
    for (first, count) in [(0, 1), (3, 1), (2, 4), (4, 2)] {
        let refused = vm.convert(first * PAGE, count * PAGE, Attribute::Private);
        assert_eq!(refused.unwrap_err().errno(), libc::EINVAL);
    }
    vm.convert(0, 8 * PAGE, Attribute::Private).unwrap();
    // What needs no change needs no permission.
    vm.convert(PAGE, PAGE, Attribute::Private).unwrap();
    vm.convert(PAGE, PAGE, Attribute::Shared).unwrap_err();
    block.reset().unwrap();
    assert_eq!(block.stats().bytes_private, 0);
}

#[test]
fn a_window_mapped_whole_can_be_reshaped_too() {
    let kernel = Arc::new(FakeKernel::new(VmKind::Ordinary));
    let fd = any_fd();
    let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
    let block = Block::new(&vm, &BlockConfig::new("ram", 16 * PAGE)).unwrap();
    let part = |first: u64, count: u64| WindowConfig {
        ioas_id: 0,
        offset: first * PAGE,
        length: count * PAGE,
        iova: first * PAGE,
        readonly: false,
    };
    let window = block.add_window(&fd, &part(4, 12)).unwrap();
    for (first, count, areas) in [(2, 14, 2), (4, 12, 1), (6, 8, 1), (0, 16, 3)] {
        window.reshape(&part(first, count)).unwrap();
        let file = block.file(Attribute::Shared);
        for page in 0..16 {
            let seen = kernel.device_sees(0, file, page * PAGE);
            let shown = (first..first + count).contains(&page);
            assert_eq!(seen, shown.then_some(page * PAGE), "page {page}");
        }
        assert_eq!(kernel.areas(0), areas);
    }
}

#[test]
fn the_file_is_used_for_dma_where_the_kernel_takes_it_and_the_address_where_not() {
    let kernel = Arc::new(FakeKernel::new(VmKind::Ordinary));
    let fd = any_fd();
    let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
    let block = Block::new(&vm, &BlockConfig::new("ram", 16 * PAGE)).unwrap();
    let config = WindowConfig {
        ioas_id: 0,
        offset: 0,
        length: 16 * PAGE,
        iova: 0,
        readonly: false,
    };
    kernel.fail(None);
    block.add_window(&fd, &config).unwrap().keep();
    assert_eq!(block.dma_path(), gmem::DmaPath::Address);
    assert_eq!(
        kernel.calls()[1..],
        ["IOMMU_OPTION", "IOMMU_IOAS_MAP_FILE", "IOMMU_IOAS_MAP"]
    );
    assert_eq!(block.stats().dma_areas, 1);
    let only_fd = BlockConfig {
        dma: gmem::DmaPath::Fd,
        ..BlockConfig::new("ram", 16 * PAGE)
    };
    let block = Block::new(&vm, &only_fd).unwrap();
    let elsewhere = WindowConfig {
        ioas_id: 1,
        ..config
    };
    let error = block.add_window(&fd, &elsewhere).unwrap_err();
    assert_eq!(error.errno(), libc::ENOTSUP, "{error}");
}

#[test]
fn creating_a_block_fails_as_a_whole() {
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let vm = Vm::with_kernel(kernel.clone(), any_fd()).unwrap();
    let config = BlockConfig::confidential("ram", 16 * PAGE, Attribute::Private);
    let open_files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    for call in 0..3 {
        let before = open_files();
        kernel.fail(Some(Failures {
            first: call,
            count: 1,
            errno: libc::EMFILE,
        }));
        let error = Block::new(&vm, &config).unwrap_err();
        kernel.fail(None);
        assert_eq!(error.errno(), libc::EMFILE, "{error}");
        // Other tests of this process open files too: only more than theirs would be a leak.
        assert!(open_files() <= before + 64);
    }
    let old = Arc::new(FakeKernel::new(VmKind::Old));
    let vm = Vm::with_kernel(old, any_fd()).unwrap();
    let error = Block::new(&vm, &BlockConfig::new("ram", PAGE)).unwrap_err();
    assert_eq!(error.errno(), libc::ENOTSUP);
    assert!(error.to_string().contains("KVM_CAP_GUEST_MEMFD"), "{error}");
}

#[test]
fn preallocation_fills_the_plane_that_the_attribute_selects() {
    let mut rig = Rig::new(Attribute::Private);
    rig.convert(0, 4, Attribute::Shared).unwrap();
    let block = &rig.blocks[0];
    block.preallocate(3).unwrap();
    for page in 0..PAGES {
        let offset = page * PAGE;
        let private = page >= 4;
        let has = |attribute| rig.kernel.has_memory(block.file(attribute), offset);
        assert_eq!(has(Attribute::Private), private, "page {page}");
        assert_eq!(has(Attribute::Shared), !private, "page {page}");
    }
}

#[test]
fn disjoint_conversions_are_in_the_kernel_at_the_same_time() {
    // Each of two conversions waits in its kernel call for the other: if the library let only one
    // in, this would never end.
    let both = Barrier::new(2);
    let calls = AtomicUsize::new(0);
    let rig = Rig::with_kernel(
        FakeKernel::with_hook(VmKind::Confidential, move |call| {
            if call == "KVM_SET_MEMORY_ATTRIBUTES" && calls.fetch_add(1, Ordering::SeqCst) < 2 {
                both.wait();
            }
        }),
        Attribute::Shared,
        DmaSplit::Page,
    );
    std::thread::scope(|scope| {
        for first in [0, 4] {
            let vm = &rig.vm;
            scope.spawn(move || {
                vm.convert(BASE + first * PAGE, 4 * PAGE, Attribute::Private)
                    .unwrap();
            });
        }
    });
    assert_eq!(rig.blocks[0].stats().bytes_private, 8 * PAGE);
}

#[test]
fn racing_conversions_lose_no_page() {
    // By cut, threads and IOASes share the context's one pointer.
    for split in [DmaSplit::Page, DmaSplit::Cut, DmaSplit::Unit(4 * PAGE)] {
        let rig = Rig::with_split(Attribute::Shared, split);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let vm = &rig.vm;
                scope.spawn(move || {
                    for round in 0..200 {
                        let attribute = match round % 2 {
                            0 => Attribute::Private,
                            _ => Attribute::Shared,
                        };
                        // Neighbouring pages, a range that overlaps the other threads', and in the end
                        // this thread's own page private.
                        vm.convert(BASE + thread * PAGE, PAGE, attribute).unwrap();
                        vm.convert(BASE + (4 + thread) * PAGE, 8 * PAGE, attribute)
                            .unwrap();
                    }
                    vm.convert(BASE + thread * PAGE, PAGE, Attribute::Private)
                        .unwrap();
                });
            }
        });
        let mut rig = rig;
        rig.convert(4, 12, Attribute::Shared).unwrap();
        rig.oracle[..4].fill(Attribute::Private);
        rig.check();
    }
}

/// Everything that devices find in both IOASes, by page of both blocks.
fn seen_by_devices(rig: &Rig) -> Vec<bool> {
    let mut seen = Vec::new();
    for ioas_id in 0..2 {
        for page in 0..2 * PAGES {
            let file = rig.blocks[(page / PAGES) as usize].file(Attribute::Shared);
            let found = rig
                .kernel
                .device_sees(ioas_id, file, IOVA_BASE + page * PAGE);
            seen.push(found.is_some());
        }
    }
    seen
}

#[test]
fn a_cut_never_takes_a_neighbour_out_not_even_for_a_moment() {
    let rig: Arc<OnceLock<Rig>> = Arc::default();
    let lost = Arc::new(AtomicUsize::new(0));
    let kernel = FakeKernel::with_hook(VmKind::Confidential, {
        let (rig, lost) = (rig.clone(), lost.clone());
        move |_| {
            let Some(rig) = rig.get() else { return };
            let neighbours = seen_by_devices(rig).into_iter().enumerate();
            let gone = neighbours.filter(|(page, seen)| page % 32 != 9 && !seen);
            lost.fetch_add(gone.count(), Ordering::SeqCst);
        }
    });
    let _ = rig.set(Rig::with_kernel(kernel, Attribute::Shared, DmaSplit::Cut));
    let rig = rig.get().unwrap();
    rig.kernel.fail(None);
    rig.vm
        .convert(BASE + 9 * PAGE, PAGE, Attribute::Private)
        .unwrap();
    assert_eq!(
        rig.kernel.calls(),
        [
            "IOMMU_VFIO_IOAS",
            "VFIO_IOMMU_UNMAP_DMA",
            "IOMMU_IOAS_COPY",
            "IOMMU_VFIO_IOAS",
            "VFIO_IOMMU_UNMAP_DMA",
            "IOMMU_IOAS_COPY",
            "KVM_SET_MEMORY_ATTRIBUTES",
            "fallocate(PUNCH_HOLE)"
        ]
    );
    assert_eq!(rig.blocks[0].strategy(), Some(StrategyKind::Cut));
    assert_eq!(rig.blocks[0].stats().dma_areas, 4);
    rig.vm
        .convert(BASE + 9 * PAGE, PAGE, Attribute::Shared)
        .unwrap();
    // Areas of their own by now: no cut, one call for each.
    rig.kernel.fail(None);
    rig.vm
        .convert(BASE + 9 * PAGE, PAGE, Attribute::Private)
        .unwrap();
    let native = |call: &&&str| **call == "IOMMU_IOAS_UNMAP";
    assert_eq!(rig.kernel.calls().iter().filter(native).count(), 2);
    assert_eq!(lost.load(Ordering::SeqCst), 0);
}

#[test]
fn a_cut_that_reached_another_ioas_is_no_success() {
    // Somebody outside the library points the context elsewhere, between the two calls.
    let kernel: Arc<OnceLock<Arc<FakeKernel>>> = Arc::default();
    let fake = FakeKernel::with_hook(VmKind::Confidential, {
        let kernel = kernel.clone();
        move |call| {
            if let ("VFIO_IOMMU_UNMAP_DMA", Some(kernel)) = (call, kernel.get()) {
                let iommufd = any_fd();
                let iommufd = iommufd.as_fd();
                kernel.vfio_ioas_set(Ioas { iommufd, id: 77 }).unwrap();
            }
        }
    });
    let mut rig = Rig::with_kernel(fake, Attribute::Shared, DmaSplit::Cut);
    let _ = kernel.set(rig.kernel.clone());
    assert!(rig.convert(9, 1, Attribute::Private).is_err());
    rig.check();
}

#[test]
fn a_part_of_a_unit_takes_the_rest_along_for_a_moment_and_that_is_counted() {
    let mut rig = Rig::with_split(Attribute::Shared, DmaSplit::Unit(4 * PAGE));
    rig.convert(9, 1, Attribute::Private).unwrap();
    rig.check();
    assert_eq!(rig.blocks[0].stats().remap_windows, 2);
    rig.convert(9, 1, Attribute::Shared).unwrap();
    rig.convert(8, 4, Attribute::Private).unwrap();
    rig.check();
    assert_eq!(
        rig.blocks[0].stats().remap_windows,
        2,
        "a whole unit has no neighbours"
    );
}

#[test]
fn a_neighbour_that_can_not_be_mapped_again_is_brought_back_or_quarantined() {
    // Page 9's unit in the first window: unmap, map page 8, map pages 10 and 11. What follows in the second
    // is an unmap, and who doesn't tell what it has done: with page 9, all of its unit may be gone.
    for (first, count, lost) in [(1, 1, 0), (2, 1, 0), (1, 40, 4), (2, 40, 4)] {
        let mut rig = Rig::with_split(Attribute::Shared, DmaSplit::Unit(4 * PAGE));
        let errno = libc::ENOMEM;
        rig.kernel.fail(Some(Failures {
            first,
            count,
            errno,
        }));
        rig.convert(9, 1, Attribute::Private).unwrap_err();
        rig.kernel.fail(None);
        assert!(!rig.kernel.is_private(Gpa(BASE + 9 * PAGE)));
        let quarantined = rig.blocks[0].stats().bytes_quarantined / PAGE;
        assert_eq!(quarantined, lost, "{count} failures from call {first}");
        for page in 8..12 {
            rig.convert(page, 1, Attribute::Private).unwrap();
            rig.convert(page, 1, Attribute::Shared).unwrap();
        }
        rig.check();
    }
}

#[test]
fn where_areas_can_not_be_cut_the_next_best_is_taken_or_refused() {
    let strategy = |split| {
        let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
        let fd = any_fd();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let config = BlockConfig {
            dma_split: split,
            release_delay: Duration::ZERO,
            ..BlockConfig::confidential("ram", PAGES * PAGE, Attribute::Shared)
        };
        let block = Block::new(&vm, &config).unwrap();
        let window = block.add_window(
            &fd,
            &WindowConfig {
                ioas_id: 0,
                offset: 0,
                length: PAGES * PAGE,
                iova: 0,
                readonly: false,
            },
        );
        window.map(|window| window.strategy())
    };
    assert_eq!(strategy(DmaSplit::default()), Ok(StrategyKind::Page));
    let unit = Some(4 * PAGE);
    let kind = StrategyKind::Unit(4 * PAGE);
    assert_eq!(strategy(DmaSplit::Auto { unit }), Ok(kind));
    let refused = strategy(DmaSplit::Cut).unwrap_err();
    assert_eq!(refused.errno(), libc::ENOTSUP);
    assert!(refused.to_string().contains("prepared"), "{refused}");
}

#[test]
fn trying_a_cut_leaves_nothing_behind_whatever_fails() {
    for call in 0.. {
        let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
        let fd = any_fd();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let ioas = Ioas {
            iommufd: fd.as_fd(),
            id: 0,
        };
        kernel.ioas_disable_huge_pages(ioas).unwrap();
        let config = BlockConfig::confidential("ram", PAGES * PAGE, Attribute::Private);
        let block = Block::new(&vm, &config).unwrap();
        kernel.fail(Some(Failures {
            first: call,
            count: 1,
            errno: libc::EINVAL,
        }));
        let window = block.add_window(
            &fd,
            &WindowConfig {
                ioas_id: 0,
                offset: 0,
                length: PAGES * PAGE,
                iova: 0,
                readonly: false,
            },
        );
        let calls = kernel.calls();
        kernel.fail(None);
        assert_eq!(kernel.areas(0), 0, "{calls:?}");
        if let Ok(window) = window {
            // To take the trial's page out is tried again.
            let failed = call < calls.len() && calls[call] != "IOMMU_IOAS_UNMAP";
            let expected = [StrategyKind::Cut, StrategyKind::Page][usize::from(failed)];
            assert_eq!(window.strategy(), expected, "{calls:?}");
            if call == calls.len() {
                break;
            }
        }
    }
}
