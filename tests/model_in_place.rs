// SPDX-License-Identifier: MIT OR Apache-2.0
//! Conversions in place, of single and of huge pages, against an oracle and a kernel that fails any
//! call, holds pages and stops half-way.
//!
//! What is to hold: library, file and oracle agree on every page; no device sees a private one and
//! each one that may sees every shared one; a request is all or nothing, but that devices may miss
//! what has just become shared, which is then quarantined and can be asked for again.

#[path = "common/max_request.rs"]
mod max_request;

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::kernel::{Ioas, Kernel};
use gmem::{
    Attribute, Backing, Block, BlockConfig, Cause, Change, DmaPath, DmaSplit, Listener, Vm, Window,
    WindowConfig,
};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex};
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const HUGE: u64 = 2 << 20;
const BASE: u64 = 1 << 30;
const IOVA_BASE: u64 = 4 << 30;
const CONVERT: &str = "KVM_SET_MEMORY_ATTRIBUTES2";

/// Of what pages a block is: how many of them, and how large.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Pages {
    Single(u64),
    Huge(u64),
}

impl Pages {
    fn bytes(self) -> u64 {
        match self {
            Pages::Single(pages) => pages * PAGE,
            Pages::Huge(pages) => pages * HUGE,
        }
    }

    fn unit(self) -> DmaSplit {
        DmaSplit::Unit(match self {
            Pages::Single(_) => 4 * PAGE,
            Pages::Huge(_) => HUGE,
        })
    }

    fn config(self, initial: Attribute, split: DmaSplit, most: Option<u64>) -> BlockConfig {
        BlockConfig {
            max_request: most.map(|pages| pages * PAGE),
            hugetlb: matches!(self, Pages::Huge(_)).then_some(HUGE),
            dma_split: split,
            ..BlockConfig::confidential("ram", self.bytes(), initial)
        }
    }
}

/// Two blocks side by side, each shown in both of two IOASes.
struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    blocks: Vec<Arc<Block>>,
    windows: Vec<Window>,
    pages: Pages,
    oracle: Vec<Attribute>,
    iommufd: std::fs::File,
}

impl Rig {
    fn new(pages: Pages, initial: Attribute, split: DmaSplit) -> Self {
        Self::on(FakeKernel::new(VmKind::InPlace), pages, initial, split)
    }

    fn on(kernel: FakeKernel, pages: Pages, initial: Attribute, split: DmaSplit) -> Self {
        Self::bounded(kernel, pages, initial, split, None)
    }

    /// With a `max_request` of so many pages.
    fn bounded(
        kernel: FakeKernel,
        pages: Pages,
        initial: Attribute,
        split: DmaSplit,
        most: Option<u64>,
    ) -> Self {
        let kernel = Arc::new(kernel);
        kernel.set_pool(16);
        let iommufd = std::fs::File::open("/dev/null").unwrap();
        for id in 0..2 {
            let iommufd = iommufd.as_fd();
            kernel
                .ioas_disable_huge_pages(Ioas { iommufd, id })
                .unwrap();
        }
        let vm = Vm::with_kernel(kernel.clone(), &iommufd).unwrap();
        let mut rig = Self {
            kernel,
            vm,
            blocks: Vec::new(),
            windows: Vec::new(),
            pages,
            oracle: Vec::new(),
            iommufd,
        };
        for number in 0..2 {
            let block = Block::new(&rig.vm, &pages.config(initial, split, most)).unwrap();
            assert_eq!(block.backing(), Backing::InPlace);
            block
                .bind(0, pages.bytes(), BASE + number * pages.bytes())
                .unwrap()
                .keep();
            for ioas_id in 0..2 {
                let config = WindowConfig {
                    ioas_id,
                    offset: 0,
                    length: pages.bytes(),
                    iova: IOVA_BASE + number * pages.bytes(),
                    readonly: false,
                };
                rig.windows
                    .push(block.add_window(&rig.iommufd, &config).unwrap());
            }
            rig.blocks.push(block);
        }
        rig.oracle = vec![initial; (2 * pages.bytes() / PAGE) as usize];
        rig
    }

    fn page_count(&self) -> u64 {
        self.oracle.len() as u64
    }

    fn convert(&mut self, first: u64, count: u64, attribute: Attribute) -> gmem::Result<()> {
        let result = self
            .vm
            .convert(BASE + first * PAGE, count * PAGE, attribute);
        if result.is_ok() {
            self.note(first, count, attribute);
        }
        result
    }

    fn note(&mut self, first: u64, count: u64, attribute: Attribute) {
        self.oracle[first as usize..(first + count) as usize].fill(attribute);
    }

    fn quarantined(&self) -> u64 {
        let blocks = self.blocks.iter();
        blocks.map(|block| block.stats().bytes_quarantined).sum()
    }

    /// Every page, as library, kernel and devices see it.
    fn check(&self) {
        self.check_but_devices();
        assert_eq!(self.quarantined(), 0);
        let mut expected = Vec::new();
        for ioas_id in 0..2 {
            let shared = self.each_page().filter(|page| page.3 == Shared);
            expected.extend(
                shared.map(|(_, offset, page, _)| (ioas_id, IOVA_BASE + page * PAGE, offset)),
            );
        }
        assert!(self.kernel.snapshot().2 == expected, "what devices see");
    }

    fn each_page(&self) -> impl Iterator<Item = (&Arc<Block>, u64, u64, Attribute)> {
        let per_block = self.pages.bytes() / PAGE;
        self.oracle
            .iter()
            .enumerate()
            .map(move |(page, &attribute)| {
                let page = page as u64;
                let block = &self.blocks[(page / per_block) as usize];
                (block, page % per_block * PAGE, page, attribute)
            })
    }

    fn check_but_devices(&self) {
        assert_eq!(self.kernel.violations(), Vec::<String>::new());
        let files = self.kernel.snapshot().1;
        for (number, block) in self.blocks.iter().enumerate() {
            let of_block = |page: &(&Arc<Block>, u64, u64, Attribute)| Arc::ptr_eq(page.0, block);
            let mine: Vec<_> = self.each_page().filter(of_block).collect();
            for &(_, offset, page, attribute) in &mine {
                assert_eq!(block.run_at(offset).unwrap().0, attribute, "page {page}");
            }
            let fd = block.file(Private).as_raw_fd();
            let told = files.iter().find(|(file, ..)| *file == fd);
            let told = told
                .map(|(_, _, private)| private.clone())
                .unwrap_or_default();
            let private = mine.iter().filter(|page| page.3 == Private);
            let expected: BTreeSet<u64> = private.map(|page| page.1).collect();
            assert!(told == expected, "the kernel on block {number}");
        }
        let per_block = (self.pages.bytes() / PAGE) as usize;
        for (block, pages) in self.blocks.iter().zip(self.oracle.chunks(per_block)) {
            let private = pages.iter().filter(|&&a| a == Private).count() as u64;
            let stats = block.stats();
            assert_eq!(stats.bytes_private, private * PAGE);
            let Pages::Huge(count) = self.pages else {
                continue;
            };
            let huge = pages.chunks((HUGE / PAGE) as usize);
            let split = huge.filter(|pages| pages.contains(&Shared)).count() as u64;
            assert_eq!(stats.huge_pages_split, split);
            assert_eq!(stats.huge_pages_whole, count - split);
        }
    }
}

fn attribute() -> impl Strategy<Value = Attribute> {
    prop_oneof![Just(Shared), Just(Private)]
}

fn pages_and_split() -> impl Strategy<Value = (Pages, DmaSplit)> {
    let kinds = [Pages::Single(24), Pages::Huge(2)];
    let rigs = kinds.map(|pages| [(pages, DmaSplit::Cut), (pages, pages.unit())]);
    prop::sample::select(rigs.concat())
}

/// Of a range, in parts of all pages: where it begins and how much it is.
fn part() -> impl Strategy<Value = (f64, f64)> {
    (0.0..1.0, 0.0..1.0)
}

fn range(rig: &Rig, (from, length): (f64, f64)) -> (u64, u64) {
    let pages = rig.page_count();
    let first = ((from * pages as f64) as u64).min(pages - 1);
    let most = pages - first;
    (first, ((length * most as f64) as u64).clamp(1, most))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_sequence_of_conversions_ends_as_the_oracle_says(
        (pages, split) in pages_and_split(),
        initial in attribute(),
        by_file in any::<bool>(),
        most in max_request::bound(16),
        ops in prop::collection::vec((part(), attribute()), 1..20),
    ) {
        let kernel = FakeKernel::new(VmKind::InPlace);
        if by_file {
            kernel.map_guest_memfds();
        }
        // Of pages, or of fourths of huge ones.
        let most = most.map(|most| match pages {
            Pages::Single(_) => most,
            Pages::Huge(_) => most * HUGE / PAGE / 4,
        });
        let mut rig = Rig::bounded(kernel, pages, initial, split, most);
        rig.check();
        for (part, attribute) in ops {
            let (first, count) = range(&rig, part);
            let (blocks, oracle) = (rig.blocks.clone(), rig.oracle.clone());
            let convert = || rig.convert(first, count, attribute);
            let asked = first..first + count;
            max_request::check(&blocks, &oracle, asked, attribute, most, convert);
            rig.check();
        }
        for block in &rig.blocks {
            let known = rig.oracle.contains(&Shared) || initial == Shared;
            let path = if by_file { DmaPath::Fd } else { DmaPath::Address };
            prop_assert!(!known || block.dma_path() == path || block.dma_path() == DmaPath::Auto);
            block.reset().unwrap();
        }
        rig.oracle.fill(initial);
        rig.check();
    }

    #[test]
    fn a_failure_anywhere_in_any_state_is_undone_or_quarantined(
        (pages, split) in pages_and_split(),
        initial in attribute(),
        before in prop::collection::vec((part(), attribute()), 0..6),
        part in part(),
        attribute in attribute(),
        failing_call in 0..40usize,
    ) {
        let mut rig = Rig::new(pages, initial, split);
        for (part, attribute) in before {
            let (first, count) = range(&rig, part);
            rig.convert(first, count, attribute).unwrap();
        }
        let range = range(&rig, part);
        fails_cleanly(&mut rig, range, attribute, failing_call);
    }
}

/// Fails one call of a conversion; false if it has no such call.
fn fails_cleanly(
    rig: &mut Rig,
    (first, count): (u64, u64),
    attribute: Attribute,
    failing_call: usize,
) -> bool {
    let snapshot = rig.kernel.snapshot();
    rig.kernel.fail(Some(Failures {
        first: failing_call,
        count: 1,
        errno: libc::ENOMEM,
    }));
    let result = rig.convert(first, count, attribute);
    let calls = rig.kernel.calls();
    rig.kernel.fail(None);
    let Err(error) = result else {
        assert!(calls.len() <= failing_call, "{calls:?}");
        rig.check();
        return false;
    };
    assert_eq!(error.errno(), libc::ENOMEM, "{error}");
    if attribute == Shared && calls[failing_call] != CONVERT {
        // There is no way back from being shared; devices get it the next time.
        rig.note(first, count, attribute);
        rig.check_but_devices();
        assert!(rig.quarantined() > 0, "{calls:?}");
    } else {
        assert_eq!(rig.kernel.snapshot(), snapshot, "{calls:?}");
        rig.check();
    }
    rig.convert(first, count, attribute).unwrap();
    rig.check();
    true
}

#[test]
fn every_step_of_every_plan_can_fail() {
    for pages in [Pages::Single(24), Pages::Huge(2)] {
        for split in [DmaSplit::Cut, pages.unit()] {
            for attribute in [Private, Shared] {
                let initial = match attribute {
                    Private => Shared,
                    Shared => Private,
                };
                for call in 0.. {
                    let mut rig = Rig::new(pages, initial, split);
                    let all = rig.page_count();
                    // Across both blocks, with a run in the middle that has the attribute already.
                    rig.convert(all / 2 - 4, 2, attribute).unwrap();
                    if !fails_cleanly(&mut rig, (3, all - 6), attribute, call) {
                        assert!(call > 4, "only {call} calls could fail");
                        break;
                    }
                }
            }
        }
    }
}

#[test]
fn one_call_converts_all_of_a_file_of_single_pages() {
    let mut rig = Rig::new(Pages::Single(24), Shared, DmaSplit::Cut);
    rig.convert(4, 2, Private).unwrap();
    rig.kernel.fail(None);
    rig.convert(0, 20, Private).unwrap();
    let calls = rig.kernel.calls();
    assert_eq!(calls.iter().filter(|&&call| call == CONVERT).count(), 1);
    // A block is a file, and a request across two is two calls.
    rig.kernel.fail(None);
    rig.convert(10, 28, Shared).unwrap();
    let calls = rig.kernel.calls();
    assert_eq!(calls.iter().filter(|&&call| call == CONVERT).count(), 1);
    rig.convert(0, 48, Private).unwrap();
    rig.kernel.fail(None);
    rig.convert(0, 48, Shared).unwrap();
    let calls = rig.kernel.calls();
    assert_eq!(calls.iter().filter(|&&call| call == CONVERT).count(), 2);
    rig.check();
}

#[test]
fn what_has_the_attribute_is_never_named_in_a_file_of_huge_pages() {
    let mut rig = Rig::new(Pages::Huge(2), Shared, DmaSplit::Cut);
    rig.convert(100, 1, Private).unwrap();
    rig.kernel.fail(None);
    rig.convert(0, 512, Private).unwrap();
    let calls = rig.kernel.calls();
    assert_eq!(calls.iter().filter(|&&call| call == CONVERT).count(), 2);
    rig.check();
}

#[test]
fn a_binding_tells_the_kernel_nothing_and_its_order_is_not_that_of_the_file() {
    let kernel = Arc::new(FakeKernel::new(VmKind::InPlace));
    let fd = std::fs::File::open("/dev/null").unwrap();
    let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
    let block = Block::new(&vm, &BlockConfig::confidential("ram", 8 * PAGE, Private)).unwrap();
    kernel.fail(None);
    // The halves change places.
    block.bind(0, 4 * PAGE, BASE + 4 * PAGE).unwrap().keep();
    block.bind(4 * PAGE, 4 * PAGE, BASE).unwrap().keep();
    assert_eq!(kernel.calls(), Vec::<&str>::new());
    vm.convert(BASE + PAGE, 4 * PAGE, Shared).unwrap();
    for page in 0..8 {
        let private = kernel.is_private_in(block.file(Private), page * PAGE);
        assert_eq!(private, ![0, 5, 6, 7].contains(&page), "page {page}");
    }
    kernel.fail(None);
    block.unbind(0, 4 * PAGE, BASE + 4 * PAGE).unwrap();
    assert_eq!(kernel.calls(), Vec::<&str>::new());
}

#[test]
fn who_holds_a_page_for_a_moment_costs_a_retry() {
    for pages in [Pages::Single(24), Pages::Huge(2)] {
        let mut rig = Rig::new(pages, Shared, DmaSplit::Cut);
        rig.kernel.hold(rig.blocks[0].file(Shared), 5 * PAGE, 3);
        rig.convert(0, 20, Private).unwrap();
        assert_eq!(rig.blocks[0].stats().retries, 3);
        rig.check();
    }
}

#[test]
fn who_holds_a_page_for_longer_is_an_error_that_says_where() {
    for pages in [Pages::Single(24), Pages::Huge(2)] {
        let mut rig = Rig::new(pages, Shared, DmaSplit::Cut);
        let snapshot = rig.kernel.snapshot();
        rig.kernel
            .hold(rig.blocks[0].file(Shared), 5 * PAGE, usize::MAX);
        let error = rig.convert(2, 20, Private).unwrap_err();
        assert_eq!(error.errno(), libc::EAGAIN);
        assert!(error.to_string().contains("offset 0x5000"), "{error}");
        assert_eq!(rig.kernel.snapshot(), snapshot);
        rig.check();
        // All others may go.
        rig.convert(6, 10, Private).unwrap();
        rig.convert(2, 3, Private).unwrap();
        rig.kernel.let_go();
        rig.convert(2, 20, Private).unwrap();
        rig.check();
    }
}

#[test]
fn a_kernel_that_stops_half_way_is_asked_for_the_rest() {
    let mut rig = Rig::new(Pages::Huge(3), Shared, DmaSplit::Cut);
    rig.kernel.fail(None);
    let held = HUGE + 7 * PAGE;
    rig.kernel.hold(rig.blocks[0].file(Shared), held, 2);
    rig.convert(0, 3 * 512, Private).unwrap();
    let stats = rig.blocks[0].stats();
    assert_eq!((stats.retries, stats.resumed), (2, 1));
    assert_eq!((stats.huge_page_merges, stats.huge_page_splits), (3, 0));
    rig.check();
    rig.convert(512, 1, Shared).unwrap();
    assert_eq!(rig.blocks[0].stats().huge_page_splits, 1);
    rig.check();
}

#[test]
fn a_kernel_that_stays_half_way_is_led_back() {
    let mut rig = Rig::new(Pages::Huge(3), Shared, DmaSplit::Cut);
    let held = 2 * HUGE + 7 * PAGE;
    rig.kernel
        .hold(rig.blocks[0].file(Shared), held, usize::MAX);
    let error = rig.convert(0, 3 * 512, Private).unwrap_err();
    assert_eq!(error.errno(), libc::EAGAIN);
    assert!(error.to_string().contains(&format!("{held:#x}")), "{error}");
    rig.check();
    assert_eq!(rig.blocks[0].stats().quarantines, 0);
}

/// What can be neither finished nor taken back keeps what it has, and no device gets it.
#[test]
fn what_stays_half_way_for_good_is_quarantined() {
    let mut rig = Rig::new(Pages::Huge(3), Shared, DmaSplit::Cut);
    let calls = {
        let mut other = Rig::new(Pages::Huge(3), Shared, DmaSplit::Cut);
        other.kernel.fail(None);
        other.convert(0, 3 * 512, Private).unwrap();
        other.kernel.calls()
    };
    let first = calls.iter().position(|&call| call == CONVERT).unwrap();
    // The first call stops after one huge page, and so does the one that is to take it back, which is
    // for one only: nothing of it happens.
    rig.kernel.fail(Some(Failures {
        first,
        count: 2,
        errno: libc::ENOMEM,
    }));
    rig.convert(0, 3 * 512, Private).unwrap_err();
    rig.kernel.fail(None);
    rig.note(0, 512, Private);
    rig.check_but_devices();
    assert_eq!(rig.quarantined(), HUGE);
    // It can be asked for again, in either direction.
    rig.convert(0, 512, Shared).unwrap();
    rig.check();
    rig.convert(0, 3 * 512, Private).unwrap();
    rig.check();
}

#[test]
fn devices_that_could_not_have_a_page_get_it_at_the_next_request() {
    let mut rig = Rig::new(Pages::Single(24), Private, DmaSplit::Cut);
    rig.kernel.fail(Some(Failures {
        first: 1,
        count: usize::MAX,
        errno: libc::ENOMEM,
    }));
    rig.convert(2, 4, Shared).unwrap_err();
    assert_eq!(rig.quarantined(), 4 * PAGE);
    // Still not.
    rig.kernel.fail(Some(Failures {
        first: 0,
        count: usize::MAX,
        errno: libc::ENOMEM,
    }));
    rig.convert(2, 4, Shared).unwrap_err();
    rig.kernel.fail(None);
    rig.note(2, 4, Shared);
    rig.check_but_devices();
    assert_eq!(rig.quarantined(), 4 * PAGE);
    // One of them turns private, which is an end as well.
    rig.convert(3, 1, Private).unwrap();
    assert_eq!(rig.quarantined(), 3 * PAGE);
    rig.convert(0, 24, Shared).unwrap();
    rig.check();
}

#[test]
fn runs_are_bounded_where_the_host_is_not_known_to_survive_them() {
    let mut rig = Rig::new(Pages::Single(4096), Shared, DmaSplit::Unit(HUGE));
    let mut refused = None;
    for page in 0..2000 {
        if let Err(error) = rig.convert(2 * page, 1, Private) {
            refused = Some((page, error));
            break;
        }
    }
    let (runs, error) = refused.unwrap();
    let too_many = Cause::MaxRuns {
        runs: 1401,
        most: 1400,
    };
    assert_eq!((runs, error.cause()), (1400, &too_many));
    assert_eq!(rig.blocks[0].stats().runs_refused, 1);
    // What leaves fewer is welcome.
    rig.convert(0, 2800, Private).unwrap();
    rig.check();
}

#[test]
fn a_vm_that_is_rebuilt_begins_as_the_first_one() {
    for pages in [Pages::Single(24), Pages::Huge(2)] {
        for initial in [Shared, Private] {
            let mut rig = Rig::new(pages, initial, DmaSplit::Cut);
            let hosts: Vec<_> = rig.blocks.iter().map(|block| block.host()).collect();
            rig.convert(3, 9, Private).unwrap();
            rig.convert(7, 2, Shared).unwrap();
            rig.vm.detach().unwrap();
            rig.kernel.rebuild_vm();
            rig.vm.attach(&rig.iommufd).unwrap();
            for (number, block) in rig.blocks.iter().enumerate() {
                assert_eq!(block.host(), hosts[number]);
                let at = BASE + number as u64 * pages.bytes();
                block.bind(0, pages.bytes(), at).unwrap().keep();
            }
            rig.oracle.fill(initial);
            rig.check();
            rig.convert(3, 9, Private).unwrap();
            rig.check();
        }
    }
}

#[test]
fn huge_pages_are_mapped_where_kvm_can_use_them() {
    let rig = Rig::new(Pages::Huge(2), Private, DmaSplit::Cut);
    for block in &rig.blocks {
        assert_eq!(block.host() as u64 % HUGE, 0);
    }
}

#[test]
fn huge_pages_are_set_aside_at_once_or_the_block_is_not() {
    let kernel = Arc::new(FakeKernel::new(VmKind::InPlace));
    kernel.set_pool(1);
    let fd = std::fs::File::open("/dev/null").unwrap();
    let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
    let config = Pages::Huge(2).config(Private, DmaSplit::Cut, None);
    let error = Block::new(&vm, &config).unwrap_err();
    assert_eq!(error.errno(), libc::ENOMEM);
    assert!(error.to_string().contains("hugepages-2048kB"), "{error}");
    assert_eq!(kernel.pool_free(), 1);
    kernel.set_pool(2);
    drop(Block::new(&vm, &config).unwrap());
    assert_eq!(kernel.pool_free(), 2);
}

#[test]
fn a_window_keeps_what_it_shows_when_it_is_reshaped() {
    let mut rig = Rig::new(Pages::Single(24), Shared, DmaSplit::Cut);
    rig.convert(4, 4, Private).unwrap();
    let config = WindowConfig {
        ioas_id: 0,
        offset: 2 * PAGE,
        length: 20 * PAGE,
        iova: IOVA_BASE + 2 * PAGE,
        readonly: false,
    };
    rig.windows[0].reshape(&config).unwrap();
    let file = rig.blocks[0].file(Shared);
    let sees = |page: u64| rig.kernel.device_sees(0, file, IOVA_BASE + page * PAGE);
    assert_eq!((sees(1), sees(5), sees(22)), (None, None, None));
    assert_eq!((sees(2), sees(21)), (Some(2 * PAGE), Some(21 * PAGE)));
}

const SECRET: u64 = 0x5ec4e7;

/// The first bytes of a page, as who has the file mapped sees them.
fn bytes_at(host: usize, offset: u64) -> *mut u64 {
    (host as *mut u8).wrapping_add(offset as usize).cast()
}

/// Neither when all is done nor at the moment when the kernel shares the page, whatever fails.
#[test]
fn a_reset_shows_nobody_what_was_private() {
    const SECRETS: [u64; 3] = [0, 3 * PAGE, 5 * PAGE];
    for pages in [Pages::Single(16), Pages::Huge(2)] {
        for first in 0.. {
            let host = Arc::new(Mutex::new(None));
            let seen = Arc::new(Mutex::new(Vec::new()));
            let hook = (host.clone(), seen.clone());
            let kernel = FakeKernel::with_hook(VmKind::InPlace, move |call| {
                if let (Some(host), CONVERT) = (*hook.0.lock().unwrap(), call) {
                    // SAFETY: the fake's file is a memfd, mapped there.
                    let read = |&at: &u64| unsafe { bytes_at(host, at).read_volatile() };
                    hook.1.lock().unwrap().extend(SECRETS.iter().map(read));
                }
            });
            let mut rig = Rig::on(kernel, pages, Shared, pages.unit());
            let base = rig.blocks[0].host() as usize;
            let last = pages.bytes() - PAGE;
            for secret in SECRETS {
                rig.convert(secret / PAGE, 1, Private).unwrap();
                // SAFETY: as above.
                unsafe { bytes_at(base, secret).write_volatile(SECRET) };
            }
            // SAFETY: as above.
            unsafe { bytes_at(base, last).write_volatile(1) };
            *host.lock().unwrap() = Some(base);
            rig.kernel.fail(Some(Failures {
                first,
                count: 1,
                errno: libc::ENOMEM,
            }));
            let failed = rig.blocks[0].reset().is_err();
            let calls = rig.kernel.calls().len();
            rig.kernel.fail(None);
            assert_eq!(failed, first < calls, "call {first}");
            let file = rig.blocks[0].file(Shared);
            for secret in SECRETS {
                // SAFETY: as above.
                let bytes = unsafe { bytes_at(base, secret).read_volatile() };
                assert!(bytes == 0 || rig.kernel.is_private_in(file, secret));
            }
            rig.blocks[0].reset().unwrap();
            rig.oracle.fill(Shared);
            rig.check();
            assert!(!seen.lock().unwrap().contains(&SECRET), "call {first}");
            // SAFETY: as above.
            let kept = unsafe { bytes_at(base, last).read_volatile() };
            assert_eq!(kept, 1, "shared before and after");
            if !failed {
                break;
            }
        }
    }
}

/// All that a listener has been told of the ends of changes.
#[derive(Default)]
struct Ears(Mutex<Vec<(Change, bool)>>);

impl Listener for Ears {
    fn begin(&self, _: &Change) -> Result<(), i32> {
        Ok(())
    }
    fn end(&self, change: &Change, changed: bool) {
        self.0.lock().unwrap().push((*change, changed));
    }
}

/// Also where undoing fails: who goes by it never touches a private page.
#[test]
fn what_a_listener_may_take_again_is_shared() {
    for pages in [Pages::Single(8), Pages::Huge(3)] {
        for (before, after) in [(Shared, Private), (Private, Shared)] {
            for first in 0.. {
                let mut rig = Rig::new(pages, before, pages.unit());
                // So that the first block changes in two runs.
                rig.convert(3, 1, after).unwrap();
                let ears: Vec<_> = rig
                    .blocks
                    .iter()
                    .map(|_| Arc::new(Ears::default()))
                    .collect();
                for (block, ears) in rig.blocks.iter().zip(&ears) {
                    block.add_listener(ears.clone()).keep();
                }
                rig.kernel.fail(Some(Failures {
                    first,
                    count: usize::MAX,
                    errno: libc::ENOMEM,
                }));
                let failed = rig.vm.convert(BASE, 2 * pages.bytes(), after).is_err();
                let calls = rig.kernel.calls().len();
                rig.kernel.fail(None);
                assert_eq!(failed, first < calls);
                for (block, ears) in rig.blocks.iter().zip(&ears) {
                    for (change, changed) in ears.0.lock().unwrap().iter() {
                        let usable = *changed == (change.attribute == Shared);
                        let (attribute, end) = block.run_at(change.span.first()).unwrap();
                        let shared = attribute == Shared && end >= change.span.end();
                        assert_eq!(usable, shared, "call {first}: {change:?}");
                    }
                }
                if !failed {
                    break;
                }
            }
        }
    }
}

/// Who makes a VM or a block gets signals, too, and somebody may hold a page at that moment.
#[test]
fn a_conversion_is_led_on_also_while_a_vm_a_block_or_its_successor_is_made() {
    const HUGE_PAGES: Pages = Pages::Huge(4);
    for errno in [libc::EINTR, libc::EAGAIN] {
        let kernel = Arc::new(FakeKernel::new(VmKind::InPlace));
        kernel.set_pool(8);
        let fd = std::fs::File::open("/dev/null").unwrap();
        // At the first conversion that the life so far has not seen fail.
        let disturb = |done: &[&str]| {
            let first = done.iter().position(|&call| call == CONVERT).unwrap();
            let count = 1;
            kernel.fail(Some(Failures {
                first,
                count,
                errno,
            }));
        };
        kernel.fail(None);
        let open = || Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let vm = open();
        disturb(&kernel.calls());
        assert_eq!(open().probe(), vm.probe());

        let config = HUGE_PAGES.config(Shared, DmaSplit::Page, None);
        kernel.fail(None);
        drop(Block::new(&vm, &config).unwrap());
        disturb(&kernel.calls());
        let block = Block::new(&vm, &config).unwrap();
        for page in 0..HUGE_PAGES.bytes() / PAGE {
            assert!(!kernel.is_private_in(block.file(Shared), page * PAGE));
        }

        vm.detach().unwrap();
        kernel.fail(None);
        vm.attach(&fd).unwrap();
        let calls = kernel.calls();
        // The one after the probe's.
        let probed = calls.iter().position(|&call| call == CONVERT).unwrap();
        vm.detach().unwrap();
        disturb(&[vec![""; probed + 1], calls[probed + 1..].to_vec()].concat());
        vm.attach(&fd).unwrap();
        assert!(!kernel.is_private_in(block.file(Shared), 0));
    }
}
