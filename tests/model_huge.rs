// SPDX-License-Identifier: MIT OR Apache-2.0
//! Conversions by the page in a block whose shared plane has huge pages, against an oracle and a
//! kernel that fails any call and whose pool runs dry.
//!
//! What is to hold: a huge page has memory while it has a shared page and no longer, and nobody's
//! shared bytes go with it, whatever fails.

#[path = "common/max_request.rs"]
mod max_request;

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::kernel::{Ioas, Kernel};
use gmem::{Attribute, Block, BlockConfig, Cause, DmaSplit, Gpa, Span, Vm, Window, WindowConfig};
use proptest::prelude::*;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const HUGE: u64 = 2 << 20;
/// Pages of a huge page.
const PER_HUGE: u64 = HUGE / PAGE;
const HUGE_PAGES: u64 = 4;
const PAGES: u64 = HUGE_PAGES * PER_HUGE;
const BASE: u64 = 1 << 30;
const IOVA_BASE: u64 = 4 << 30;

const STRATEGIES: [DmaSplit; 2] = [DmaSplit::Cut, DmaSplit::Unit(HUGE)];

/// Where huge pages come from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    /// The host's pool.
    Pool,
    /// The kernel's own choice, among small ones.
    Transparent,
}

const SOURCES: [Source; 2] = [Source::Pool, Source::Transparent];

struct Rig {
    source: Source,
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    block: Arc<Block>,
    _window: Window,
    oracle: Vec<Attribute>,
}

impl Rig {
    fn new(initial: Attribute, split: DmaSplit) -> Self {
        Self::of(Source::Pool, initial, split)
    }

    fn of(source: Source, initial: Attribute, split: DmaSplit) -> Self {
        Self::bounded(source, initial, split, None)
    }

    /// With a `max_request` of so many pages.
    fn bounded(source: Source, initial: Attribute, split: DmaSplit, most: Option<u64>) -> Self {
        let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
        match source {
            Source::Pool => kernel.set_pool(HUGE_PAGES as usize),
            Source::Transparent => kernel.set_transparent_huge_page(HUGE),
        }
        let fd = std::fs::File::open("/dev/null").unwrap();
        let ioas = Ioas {
            iommufd: fd.as_fd(),
            id: 0,
        };
        if split == DmaSplit::Cut {
            kernel.ioas_disable_huge_pages(ioas).unwrap();
        }
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let config = BlockConfig {
            hugetlb: (source == Source::Pool).then_some(HUGE),
            dma_split: split,
            release_delay: Duration::ZERO,
            max_request: most.map(|pages| pages * PAGE),
            ..BlockConfig::confidential("ram", PAGES * PAGE, initial)
        };
        let block = Block::new(&vm, &config).unwrap();
        let gpas = Span::new(Gpa(BASE), PAGES * PAGE).unwrap();
        kernel.add_slot(gpas, block.file(Shared), 0);
        block.bind(0, PAGES * PAGE, BASE).unwrap().keep();
        let window = WindowConfig {
            ioas_id: 0,
            offset: 0,
            length: PAGES * PAGE,
            iova: IOVA_BASE,
            readonly: false,
        };
        let window = block.add_window(&fd, &window).unwrap();
        Self {
            source,
            kernel,
            vm,
            block,
            _window: window,
            oracle: vec![initial; PAGES as usize],
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

    fn check(&self) {
        assert_eq!(self.kernel.violations(), Vec::<String>::new());
        let block = &self.block;
        let mut live = 0;
        for (huge, pages) in self.oracle.chunks(PER_HUGE as usize).enumerate() {
            let first = huge as u64 * HUGE;
            let shared = pages.contains(&Shared);
            live += u64::from(shared);
            let has = |page: u64| {
                let offset = first + page * PAGE;
                self.kernel.has_memory(block.file(Shared), offset)
            };
            match self.source {
                Source::Pool => assert_eq!(has(0), shared, "huge page {huge}"),
                Source::Transparent if shared => {}
                Source::Transparent => assert!(!(0..PER_HUGE).any(has), "huge page {huge}"),
            }
            for (page, &attribute) in pages.iter().enumerate() {
                let offset = first + page as u64 * PAGE;
                assert_eq!(
                    self.kernel.is_private(Gpa(BASE + offset)),
                    attribute == Private
                );
                let seen = self
                    .kernel
                    .device_sees(0, block.file(Shared), IOVA_BASE + offset);
                let visible = (attribute == Shared).then_some(offset);
                assert_eq!(seen, visible, "offset {offset:#x}");
            }
        }
        if self.source == Source::Pool {
            assert_eq!(block.stats().huge_pages_shared, live);
            assert_eq!(self.kernel.pool_free() as u64, HUGE_PAGES - live);
        }
        assert_eq!(block.stats().bytes_quarantined, 0);
    }
}

fn attribute() -> impl Strategy<Value = Attribute> {
    prop_oneof![Just(Shared), Just(Private)]
}

fn strategy() -> impl Strategy<Value = DmaSplit> {
    prop::sample::select(STRATEGIES.to_vec())
}

/// Ends often lie on a huge page's edge or a page beside it.
fn page() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..=PAGES,
        (0..=HUGE_PAGES, 0..3u64)
            .prop_map(|(huge, beside)| { (huge * PER_HUGE + beside).saturating_sub(1).min(PAGES) })
    ]
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    (page(), page())
        .prop_filter("not empty", |(a, b)| a != b)
        .prop_map(|(a, b)| (a.min(b), a.abs_diff(b)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_huge_page_lives_as_long_as_one_of_its_pages_is_shared(
        source in prop::sample::select(SOURCES.to_vec()),
        initial in attribute(),
        split in strategy(),
        most in max_request::bound(PAGES),
        ops in prop::collection::vec((range(), attribute()), 1..16),
    ) {
        let mut rig = Rig::bounded(source, initial, split, most);
        rig.check();
        for ((first, count), attribute) in ops {
            let (blocks, oracle) = ([rig.block.clone()], rig.oracle.clone());
            let convert = || rig.convert(first, count, attribute);
            let asked = first..first + count;
            max_request::check(&blocks, &oracle, asked, attribute, most, convert);
            rig.check();
        }
        rig.block.reset().unwrap();
        rig.oracle.fill(initial);
        rig.check();
    }

    #[test]
    fn a_failure_anywhere_in_any_state_changes_nothing(
        source in prop::sample::select(SOURCES.to_vec()),
        initial in attribute(),
        split in strategy(),
        before in prop::collection::vec((range(), attribute()), 0..6),
        (first, count) in range(),
        attribute in attribute(),
        failing_call in 0..40usize,
    ) {
        let mut rig = Rig::of(source, initial, split);
        for ((first, count), attribute) in before {
            rig.convert(first, count, attribute).unwrap();
        }
        fails_cleanly(&mut rig, (first, count), attribute, failing_call);
    }
}

/// Fails one call of a conversion; false if it has no such call.
fn fails_cleanly(
    rig: &mut Rig,
    (first, count): (u64, u64),
    attribute: Attribute,
    failing_call: usize,
) -> bool {
    rig.kernel.fail(Some(Failures {
        first: failing_call,
        count: 1,
        errno: libc::ENOMEM,
    }));
    let result = rig.convert(first, count, attribute);
    let calls = rig.kernel.calls();
    rig.kernel.fail(None);
    if let Err(error) = result {
        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
        rig.check();
        rig.convert(first, count, attribute).unwrap();
        rig.check();
        return true;
    }
    // Only a release may fail without a word to the guest.
    if let Some(call) = calls.get(failing_call) {
        assert_eq!(*call, "fallocate(PUNCH_HOLE)", "{calls:?}");
        return true;
    }
    rig.check();
    false
}

#[test]
fn every_step_of_every_plan_can_fail_and_is_undone() {
    for split in STRATEGIES {
        for attribute in [Private, Shared] {
            let initial = if attribute == Private {
                Shared
            } else {
                Private
            };
            for call in 0.. {
                // Ends within huge pages, and finds two runs of the attribute already there.
                let mut rig = Rig::new(initial, split);
                rig.convert(10, 2, attribute).unwrap();
                rig.convert(PER_HUGE + 3, 1, attribute).unwrap();
                let range = (5, 2 * PER_HUGE);
                if !fails_cleanly(&mut rig, range, attribute, call) {
                    assert!(call > 3, "only {call} calls could fail");
                    break;
                }
            }
        }
    }
}

/// A whole huge page is taken as such, and goes as such with its last shared page: punching single
/// pages out of it would free nothing.
#[test]
fn a_transparent_huge_page_goes_with_its_last_shared_page() {
    let mut rig = Rig::of(Source::Transparent, Private, DmaSplit::Cut);
    rig.kernel.fail(None);
    rig.convert(0, 2 * PER_HUGE, Shared).unwrap();
    let populated = "madvise(MADV_POPULATE_WRITE)";
    assert!(rig.kernel.calls().contains(&populated));
    for page in 0..PER_HUGE {
        rig.convert(page, 1, Private).unwrap();
    }
    rig.check();
    // Single pages are not worth a huge one.
    rig.kernel.fail(None);
    rig.convert(7, 3, Shared).unwrap();
    assert!(!rig.kernel.calls().contains(&populated));
    rig.check();
}

#[test]
fn an_empty_pool_is_an_error_that_names_it_and_nothing_changes() {
    for split in STRATEGIES {
        let mut rig = Rig::new(Private, split);
        rig.kernel.set_pool(2);
        // Three huge pages, of which the pool has two.
        let error = rig.convert(100, 2 * PER_HUGE, Shared).unwrap_err();
        assert!(matches!(error.cause(), Cause::PoolEmpty(_)), "{error:?}");
        let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
        assert!(error.to_string().contains(pool), "{error}");
        assert_eq!(rig.kernel.pool_free(), 2);
        rig.kernel.set_pool(HUGE_PAGES as usize);
        rig.check();

        // The undo frees what it has taken, and not what others share.
        rig.convert(50, 1, Shared).unwrap();
        rig.kernel.set_pool(1);
        rig.convert(100, PER_HUGE, Shared).unwrap_err();
        assert_eq!(rig.kernel.pool_free(), 0);
        rig.convert(100, 20, Shared).unwrap();
        rig.kernel.set_pool(HUGE_PAGES as usize);
        rig.check();
    }
}

#[test]
fn memory_that_is_shared_at_first_is_there_at_first_or_the_block_is_not() {
    let fd = std::fs::File::open("/dev/null").unwrap();
    let vm_with_pool = |pages| {
        let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
        kernel.set_pool(pages);
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        (kernel, vm)
    };
    let mut config = BlockConfig {
        hugetlb: Some(HUGE),
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", 2 * HUGE, Shared)
    };
    let (_, vm) = vm_with_pool(1);
    let error = Block::new(&vm, &config).unwrap_err();
    assert!(matches!(error.cause(), Cause::PoolEmpty(_)), "{error:?}");
    assert!(error.to_string().contains("hugepages-2048kB"), "{error}");

    // Without reserve, when it is touched.
    let (kernel, vm) = vm_with_pool(1);
    config.reserve = false;
    let block = Block::new(&vm, &config).unwrap();
    assert_eq!(kernel.pool_free(), 1);
    drop(block);
    config.initial = Private;
    config.reserve = true;
    let block = Block::new(&vm, &config).unwrap();
    assert_eq!(kernel.pool_free(), 1);
    assert_eq!(block.stats().huge_pages_shared, 0);
}

/// A device may still hold a page of it: then it stays the file's.
#[test]
fn a_huge_page_with_a_quarantined_page_is_not_freed() {
    let split = DmaSplit::Cut;
    for call in 0..40 {
        let mut rig = Rig::new(Private, split);
        rig.convert(0, 1, Shared).unwrap();
        rig.kernel.fail(Some(Failures {
            first: call,
            count: usize::MAX,
            errno: libc::ENOMEM,
        }));
        let result = rig.convert(1, 3, Shared);
        rig.kernel.fail(None);
        if result.is_ok() {
            break;
        }
        let quarantined = rig.block.stats().bytes_quarantined;
        rig.convert(0, 1, Private).unwrap();
        let has = rig.kernel.has_memory(rig.block.file(Shared), 0);
        assert_eq!(has, quarantined != 0, "call {call}");
        rig.convert(0, 4, Shared).unwrap();
        rig.check();
        rig.convert(0, 4, Private).unwrap();
        rig.check();
    }
}

#[test]
fn conversions_in_one_huge_page_take_turns() {
    let rig = Rig::new(Private, DmaSplit::Cut);
    std::thread::scope(|scope| {
        for page in 0..2 {
            let vm = &rig.vm;
            scope.spawn(move || {
                for _ in 0..1000 {
                    vm.convert(BASE + page * PAGE, PAGE, Shared).unwrap();
                    vm.convert(BASE + page * PAGE, PAGE, Private).unwrap();
                }
            });
        }
    });
    rig.check();
}

#[test]
fn what_huge_pages_can_not_be_is_said() {
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let fd = std::fs::File::open("/dev/null").unwrap();
    let vm = Vm::with_kernel(kernel, &fd).unwrap();
    let new = |change: fn(&mut BlockConfig)| {
        let mut config = BlockConfig {
            hugetlb: Some(HUGE),
            release_delay: Duration::ZERO,
            ..BlockConfig::confidential("ram", 4 * HUGE, Private)
        };
        change(&mut config);
        Block::new(&vm, &config)
    };
    new(|_| ()).unwrap();
    for (part, change) in [
        (
            "neither 2 MiB nor 1 GiB",
            (|c| c.hugetlb = Some(PAGE)) as fn(&mut BlockConfig),
        ),
        ("not a multiple of hugetlbsize, 1 GiB", |c| {
            c.hugetlb = Some(1 << 30)
        }),
        ("not a multiple of hugetlbsize, 2 MiB", |c| c.size += PAGE),
        ("for confidential VMs", |c| {
            c.confidential = false;
            c.initial = Shared;
        }),
        ("lacks, for this VM: KVM_SET_MEMORY_ATTRIBUTES2", |c| {
            c.backing = gmem::BackingChoice::Only(gmem::Backing::InPlace);
        }),
    ] {
        let error = new(change).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}
