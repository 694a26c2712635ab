// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one request of a guest may cost: time of others, memory of the library, memory that is there twice.

#[path = "../benches/common/mod.rs"]
#[allow(dead_code)]
mod common;
#[path = "../benches/counting/mod.rs"]
#[allow(dead_code)]
mod counting;

use counting::Heap;
use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::kernel::null::NullKernel;
use gmem::{
    Attribute, Block, BlockConfig, Cause, Change, ConvertUnit, DmaSplit, Listener, Vm, Window,
    WindowConfig, PAGE_SIZE,
};
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = PAGE_SIZE;
const GIB: u64 = 1 << 30;
const MIB: usize = 1 << 20;

/// One test at a time: what is allocated is counted for the whole process.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> impl Drop {
    ALONE.lock().unwrap_or_else(|error| error.into_inner())
}

fn any_file() -> File {
    File::open("/dev/null").unwrap()
}

/// A block on a kernel that costs nothing, bound at its offsets, in which no request is too large.
fn null_block(size: u64) -> (Arc<Vm>, Arc<Block>) {
    let vm = Vm::with_kernel(Arc::new(NullKernel), any_file()).unwrap();
    let config = BlockConfig {
        max_request: Some(size),
        ..BlockConfig::confidential("ram", size, Shared)
    };
    let block = Block::new(&vm, &config).unwrap();
    block.bind(0, size, 0).unwrap().keep();
    (vm, block)
}

fn alternate(vm: &Vm, bytes: u64) {
    for page in (0..bytes / PAGE).step_by(2) {
        vm.convert(page * PAGE, PAGE, Private).unwrap();
    }
}

/// A bit a page, for which a list of runs would take a hundred bytes each. Optimized, it is the figure that
/// documentation gives; else an eighth of it will do.
#[test]
fn a_request_over_alternating_pages_takes_a_bit_for_each_page() {
    let _alone = alone();
    let size = if cfg!(debug_assertions) {
        8 * GIB
    } else {
        64 * GIB
    };
    for attribute in [Private, Shared] {
        let (vm, block) = null_block(size);
        alternate(&vm, size);
        assert_eq!(block.stats().runs, size / PAGE / 2);
        let heap = Heap::now();
        vm.convert(0, size, attribute).unwrap();
        let most = heap.most_grown() as u64;
        assert!(
            most * (64 * GIB / size) <= 16 << 20,
            "{most} bytes to {attribute:?}"
        );
        assert!(block.stats().runs <= 1);
    }
}

/// With windows and listeners there is more to do for each run, and no more memory to do it with.
#[test]
fn devices_and_listeners_make_no_list_of_runs_either() {
    struct Counts(AtomicU64);
    impl Listener for Counts {
        fn begin(&self, _change: &Change) -> Result<(), i32> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        fn end(&self, _change: &Change, changed: bool) {
            self.0
                .fetch_add(u64::from(changed) << 32, Ordering::Relaxed);
        }
    }
    let _alone = alone();
    const BYTES: u64 = GIB;
    const RUNS: u64 = BYTES / PAGE / 2;
    for split in [DmaSplit::Cut, DmaSplit::Page, DmaSplit::Unit(2 << 20)] {
        let vm = Vm::with_kernel(Arc::new(NullKernel), any_file()).unwrap();
        let config = BlockConfig {
            dma_split: split,
            ..BlockConfig::confidential("ram", BYTES, Shared)
        };
        let block = Block::new(&vm, &config).unwrap();
        block.bind(0, BYTES, 0).unwrap().keep();
        let _window = block.add_window(&*IOMMUFD, &window(BYTES)).unwrap();
        alternate(&vm, BYTES);
        let listener = Arc::new(Counts(AtomicU64::new(0)));
        block.add_listener(listener.clone()).keep();
        for attribute in [Private, Shared] {
            let books = block.stats().bookkeeping_bytes as usize;
            let heap = Heap::now();
            vm.convert(0, BYTES, attribute).unwrap();
            let books = (block.stats().bookkeeping_bytes as usize).saturating_sub(books);
            let most = heap.most_grown();
            assert!(most <= MIB + books, "{most} bytes by {split:?}");
            let told = listener.0.swap(0, Ordering::Relaxed);
            let runs = if attribute == Private { RUNS } else { 1 };
            assert_eq!((told >> 32, told & 0xffff_ffff), (runs, runs));
        }
    }
}

static IOMMUFD: std::sync::LazyLock<File> = std::sync::LazyLock::new(any_file);

fn window(bytes: u64) -> WindowConfig {
    WindowConfig {
        ioas_id: 1,
        offset: 0,
        length: bytes,
        iova: 0,
        readonly: false,
    }
}

#[test]
fn a_request_that_there_is_no_memory_for_is_refused_and_changes_nothing() {
    let _alone = alone();
    const BYTES: u64 = GIB;
    let (vm, block) = null_block(BYTES);
    alternate(&vm, BYTES);
    let before = block.stats();
    // A bit a page is 32 KiB.
    let refused = Heap::now().with_most(16 << 10, || vm.convert(0, BYTES, Private));
    let error = refused.unwrap_err();
    assert_eq!(error.errno(), libc::ENOMEM, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("ram") && text.contains("0x0..0x40000000"),
        "{text}"
    );
    assert!(text.contains("ask for less"), "{text}");
    assert_eq!(block.stats().runs, before.runs);
    vm.convert(0, BYTES, Private).unwrap();
}

/// A block on the fake kernel.
fn fake_block(kernel: &Arc<FakeKernel>, pages: u64, most: Option<u64>) -> (Arc<Vm>, Arc<Block>) {
    let vm = Vm::with_kernel(kernel.clone(), any_file()).unwrap();
    let config = BlockConfig {
        max_request: most,
        dma_split: DmaSplit::Page,
        ..BlockConfig::confidential("ram", pages * PAGE, Shared)
    };
    let block = Block::new(&vm, &config).unwrap();
    block.bind(0, pages * PAGE, 0).unwrap().keep();
    (vm, block)
}

#[test]
fn what_changes_more_than_max_request_is_refused_by_name_and_counted() {
    let _alone = alone();
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let (vm, block) = fake_block(&kernel, 64, Some(16 * PAGE));
    kernel.fail(None);
    let error = vm.convert(0, 17 * PAGE, Private).unwrap_err();
    let bytes = 17 * PAGE;
    let most = 16 * PAGE;
    assert_eq!(*error.cause(), Cause::MaxRequest { bytes, most });
    let text = error.to_string();
    assert!(
        text.contains("ram: ") && text.contains("max-request is 0x10000"),
        "{text}"
    );
    assert_eq!(kernel.calls(), Vec::<&str>::new());
    assert_eq!(block.stats().requests_refused, 1);
    // What has the attribute changes nothing, and between two pages that change it counts.
    vm.convert(0, 64 * PAGE, Shared).unwrap();
    vm.convert(0, 16 * PAGE, Private).unwrap();
    vm.convert(0, 18 * PAGE, Private).unwrap();
    vm.convert(40 * PAGE, PAGE, Private).unwrap();
    vm.convert(0, 64 * PAGE, Shared).unwrap_err();
    vm.convert(8 * PAGE, PAGE, Shared).unwrap();
    vm.convert(0, 10 * PAGE, Private).unwrap();
    assert_eq!(block.stats().requests_refused, 2);
    // Of all blocks together.
    let config = BlockConfig {
        max_request: Some(16 * PAGE),
        ..BlockConfig::confidential("more", 16 * PAGE, Shared)
    };
    let more = Block::new(&vm, &config).unwrap();
    more.bind(0, 16 * PAGE, 64 * PAGE).unwrap().keep();
    vm.convert(60 * PAGE, 20 * PAGE, Private).unwrap_err();
    vm.convert(56 * PAGE, 16 * PAGE, Private).unwrap();
    assert_eq!(more.stats().requests_refused, 1);
    // A reset is nobody's request.
    block.reset().unwrap();
    assert_eq!(block.stats().bytes_private, 0);
    let config = BlockConfig {
        max_request: Some(1),
        ..BlockConfig::confidential("none", PAGE, Shared)
    };
    assert_eq!(Block::new(&vm, &config).unwrap_err().errno(), libc::EINVAL);
}

/// Who leaves a bound out, or sets it, finds what holds in the block's numbers.
#[test]
fn bounds_are_told_as_they_hold() {
    let _alone = alone();
    let bounds = |kind, config: &BlockConfig| {
        let kernel = Arc::new(FakeKernel::new(kind));
        let vm = Vm::with_kernel(kernel, any_file()).unwrap();
        let stats = Block::new(&vm, config).unwrap().stats();
        [
            stats.max_runs,
            stats.max_request,
            stats.release_delay_ms,
            stats.max_pending,
        ]
    };
    let confidential = BlockConfig::confidential("ram", 4 * GIB, Shared);
    let split = bounds(VmKind::Confidential, &confidential);
    assert_eq!(split, [0, GIB, 100, 64 << 20]);
    let in_place = bounds(VmKind::InPlace, &confidential);
    assert_eq!(in_place, [1400, GIB, 0, 0]);
    let given = BlockConfig {
        convert_unit: ConvertUnit::Bytes(2 * GIB),
        release_delay: Duration::ZERO,
        max_runs: Some(7),
        ..confidential
    };
    let given = bounds(VmKind::Confidential, &given);
    assert_eq!(given, [7, 2 * GIB, 0, 0]);
    let ordinary = BlockConfig::new("ram", GIB);
    assert_eq!(bounds(VmKind::Ordinary, &ordinary), [0; 4]);
}

/// Nothing is mapped, and nothing has memory, between pages that change; unless something is wrong there.
#[test]
fn runs_have_calls_in_common_where_nothing_lies_between_them() {
    let _alone = alone();
    const RUNS: usize = 8;
    for poisoned in [false, true] {
        let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
        let vm = Vm::with_kernel(kernel.clone(), any_file()).unwrap();
        let config = BlockConfig {
            dma_split: DmaSplit::Page,
            release_delay: std::time::Duration::ZERO,
            ..BlockConfig::confidential("ram", 64 * PAGE, Shared)
        };
        let block = Block::new(&vm, &config).unwrap();
        block.bind(0, 64 * PAGE, 0).unwrap().keep();
        let _window = block.add_window(&*IOMMUFD, &window(64 * PAGE)).unwrap();
        let count = |what: &str| {
            let calls = kernel.calls();
            calls.iter().filter(|&&call| call == what).count()
        };
        let span = 2 * RUNS as u64 * PAGE;
        for (to, back) in [(Private, Shared), (Shared, Private)] {
            vm.convert(0, 64 * PAGE, back).unwrap();
            for page in (0..2 * RUNS as u64).step_by(2) {
                vm.convert(page * PAGE, PAGE, to).unwrap();
            }
            if poisoned && to == Private {
                // Behind a private page.
                block.poison(4 * PAGE, 1).unwrap();
            }
            kernel.fail(None);
            vm.convert(0, span, to).unwrap();
            assert_eq!(count("KVM_SET_MEMORY_ATTRIBUTES"), 1);
            let each = if poisoned { RUNS } else { 1 };
            assert_eq!(count("fallocate(PUNCH_HOLE)"), each, "to {to:?}");
            match to {
                Private => assert_eq!(count("IOMMU_IOAS_UNMAP"), each),
                Shared => assert_eq!(count("IOMMU_IOAS_MAP_FILE"), RUNS),
            }
            assert_eq!(kernel.violations(), Vec::<String>::new());
            if poisoned {
                assert_eq!(block.stats().bytes_poisoned, PAGE);
                break;
            }
        }
    }
}

/// As many vCPUs as there are blocks of 256 MiB share all of it at once.
#[test]
fn what_all_requests_have_twice_is_no_more_than_the_budget() {
    let _alone = alone();
    const BYTES: u64 = 256 << 20;
    let vm = Vm::with_kernel(Arc::new(NullKernel), any_file()).unwrap();
    // Between begin, which comes before memory is reserved, and the end.
    struct Twice {
        now: AtomicU64,
        most: AtomicU64,
    }
    impl Listener for Twice {
        fn begin(&self, change: &Change) -> Result<(), i32> {
            if change.attribute == Shared {
                let size = change.span.size_bytes();
                let now = self.now.fetch_add(size, Ordering::SeqCst) + size;
                self.most.fetch_max(now, Ordering::SeqCst);
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            Ok(())
        }
        fn end(&self, change: &Change, _changed: bool) {
            if change.attribute == Shared {
                self.now
                    .fetch_sub(change.span.size_bytes(), Ordering::SeqCst);
            }
        }
    }
    let twice = Arc::new(Twice {
        now: AtomicU64::new(0),
        most: AtomicU64::new(0),
    });
    let blocks: Vec<_> = (0..8)
        .map(|number| {
            let config = BlockConfig::confidential("ram", BYTES, Private);
            let block = Block::new(&vm, &config).unwrap();
            block.bind(0, BYTES, number * BYTES).unwrap().keep();
            block.add_listener(twice.clone()).keep();
            block
        })
        .collect();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let vm = &vm;
            scope.spawn(move || {
                for _ in 0..20 {
                    vm.convert(number * BYTES, BYTES, Shared).unwrap();
                    vm.convert(number * BYTES, BYTES, Private).unwrap();
                }
            });
        }
    });
    let most = twice.most.load(Ordering::SeqCst);
    assert!(most <= GIB, "{most:#x} bytes twice");
    assert!(most > BYTES, "requests that fit go at the same time");
    assert!(blocks.iter().all(|block| block.stats().failures == 0));
}

/// The largest request is stuck in the kernel, and so are those that wait for what it has of the budget.
#[test]
fn a_bind_of_other_pages_waits_for_no_request_however_large() {
    let _alone = alone();
    let (stuck, reached) = mpsc::channel();
    let (go, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(Some((stuck, gate)));
    let kernel = FakeKernel::with_hook(VmKind::Confidential, move |call| {
        if call != "KVM_SET_MEMORY_ATTRIBUTES" {
            return;
        }
        let gate = gate.lock().unwrap().take();
        if let Some((stuck, gate)) = gate {
            stuck.send(()).unwrap();
            let _ = gate.recv();
        }
    });
    let kernel = Arc::new(kernel);
    let vm = Vm::with_kernel(kernel.clone(), any_file()).unwrap();
    let config = BlockConfig {
        reserve: false,
        ..BlockConfig::confidential("ram", 2 * GIB, Private)
    };
    // Bound when its pages are known to the VM: no call for it yet.
    let block = Block::new(
        &vm,
        &BlockConfig {
            initial: Shared,
            ..config.clone()
        },
    )
    .unwrap();
    block.bind(0, 2 * GIB, 0).unwrap().keep();
    let other = Block::new(
        &vm,
        &BlockConfig {
            size: PAGE,
            initial: Shared,
            ..config
        },
    )
    .unwrap();
    std::thread::scope(|scope| {
        let large = scope.spawn(|| vm.convert(0, GIB, Private).unwrap());
        reached.recv().unwrap();
        other.bind(0, PAGE, 4 * GIB).unwrap().keep();
        vm.convert(4 * GIB, PAGE, Private).unwrap();
        other.unbind(0, PAGE, 4 * GIB).unwrap();
        assert!(!large.is_finished());
        go.send(()).unwrap();
        large.join().unwrap();
    });
}

/// What a VMM does for a guest that has made many runs takes no list of them either.
#[test]
fn binding_and_rebuilding_a_block_of_many_runs_takes_no_list_of_them() {
    struct Hears;
    impl Listener for Hears {
        fn begin(&self, _change: &Change) -> Result<(), i32> {
            Ok(())
        }
        fn end(&self, _change: &Change, _changed: bool) {}
    }
    let _alone = alone();
    let (vm, block) = null_block(GIB);
    alternate(&vm, GIB);
    block.unbind(0, GIB, 0).unwrap();
    let heap = Heap::now();
    block.bind(0, GIB, GIB).unwrap().keep();
    let most = heap.most_grown();
    assert!(most < 64 << 10, "{most} bytes for a binding");
    block.add_listener(Arc::new(Hears)).keep();
    let heap = Heap::now();
    vm.detach().unwrap();
    let most = heap.most_grown();
    assert!(most < 64 << 10, "{most} bytes for a rebuild");
    assert_eq!(block.stats().runs, 0);
}

/// In place, where a DMA map is what can fail after the decision.
#[test]
fn a_reset_goes_on_with_all_pieces_and_says_what_failed() {
    let _alone = alone();
    const PIECE: u64 = 64 << 20;
    let kernel = Arc::new(FakeKernel::new(VmKind::InPlace));
    let vm = Vm::with_kernel(kernel.clone(), any_file()).unwrap();
    let config = BlockConfig {
        dma_split: DmaSplit::Page,
        ..BlockConfig::confidential("ram", 4 * PIECE, Shared)
    };
    let block = Block::new(&vm, &config).unwrap();
    block.bind(0, 4 * PIECE, 0).unwrap().keep();
    let at = |piece: u64| piece * PIECE + 8 * PAGE;
    for piece in 0..4 {
        vm.convert(at(piece), PAGE, Private).unwrap();
    }
    for piece in 0..4 {
        let window = WindowConfig {
            offset: at(piece),
            iova: at(piece),
            ..window(PAGE)
        };
        block.add_window(&*IOMMUFD, &window).unwrap().keep();
    }
    let maps = AtomicU64::new(0);
    kernel.fail_if(move |call| {
        let maps_now = call.starts_with("IOMMU_IOAS_MAP");
        let fails = maps_now && maps.fetch_add(1, Ordering::SeqCst) == 0;
        fails.then_some(libc::ENOMEM)
    });
    let error = block.reset().unwrap_err();
    kernel.fail(None);
    assert_eq!(error.errno(), libc::ENOMEM, "{error}");
    let stats = block.stats();
    assert_eq!(stats.bytes_private, 0, "the reset stopped");
    assert_eq!(stats.failures, 1);
    // What it healed at its end, too.
    assert_eq!(
        (stats.bytes_dma_mapped, stats.bytes_quarantined),
        (4 * PAGE, 0)
    );
}

/// Only who holds pages takes his time: a listener that says the same costs nothing, and a reset goes on.
#[test]
fn a_reset_goes_on_however_many_pieces_a_listener_refuses() {
    struct Refuses(AtomicU64);
    impl Listener for Refuses {
        fn begin(&self, change: &Change) -> Result<(), i32> {
            match change.attribute {
                Private => Ok(()),
                Shared => {
                    self.0.fetch_add(1, Ordering::SeqCst);
                    Err(libc::EAGAIN)
                }
            }
        }
        fn end(&self, _change: &Change, _changed: bool) {}
    }
    const PIECES: u64 = 40;
    const PIECE: u64 = 64 << 20;
    let _alone = alone();
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let vm = Vm::with_kernel(kernel.clone(), any_file()).unwrap();
    let config = BlockConfig::confidential("ram", PIECES * PIECE, Shared);
    let block = Block::new(&vm, &config).unwrap();
    block.bind(0, PIECES * PIECE, 0).unwrap().keep();
    for piece in 0..PIECES {
        vm.convert(piece * PIECE, PAGE, Private).unwrap();
    }
    let refuses = Arc::new(Refuses(AtomicU64::new(0)));
    block.add_listener(refuses.clone()).keep();
    assert_eq!(block.reset().unwrap_err().errno(), libc::EAGAIN);
    assert_eq!(refuses.0.load(Ordering::SeqCst), PIECES);
}

/// Somebody who refuses what nobody can refuse is named now and then, however many runs there are.
#[test]
fn a_rebuild_that_a_listener_refuses_does_not_fill_the_log() {
    struct Refuses;
    impl Listener for Refuses {
        fn begin(&self, change: &Change) -> Result<(), i32> {
            match change.attribute {
                Private => Ok(()),
                Shared => Err(libc::EBUSY),
            }
        }
        fn end(&self, _change: &Change, _changed: bool) {}
    }
    struct Counts;
    impl log::Log for Counts {
        fn enabled(&self, metadata: &log::Metadata) -> bool {
            metadata.level() == log::Level::Error
        }
        fn log(&self, record: &log::Record) {
            if record
                .args()
                .to_string()
                .contains("the VM is rebuilt, although")
            {
                LINES.fetch_add(1, Ordering::SeqCst);
            }
        }
        fn flush(&self) {}
    }
    static LINES: AtomicU64 = AtomicU64::new(0);
    let _alone = alone();
    log::set_logger(&Counts).unwrap();
    log::set_max_level(log::LevelFilter::Error);
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let (vm, block) = fake_block(&kernel, 2000, None);
    alternate(&vm, 2000 * PAGE);
    block.add_listener(Arc::new(Refuses)).keep();
    block.unbind(0, 2000 * PAGE, 0).unwrap();
    vm.detach().unwrap();
    assert_eq!(block.stats().bytes_private, 0);
    let lines = LINES.load(Ordering::SeqCst);
    assert!((1..=20).contains(&lines), "{lines} lines");
}

/// A page that can't be mapped any more is asked for without end.
#[test]
fn what_can_not_be_healed_is_tried_now_and_then_and_counted_once() {
    let _alone = alone();
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let (vm, block) = fake_block(&kernel, 16, None);
    let _window: Window = block.add_window(&*IOMMUFD, &window(16 * PAGE)).unwrap();
    let fail_from = |first| {
        kernel.fail(Some(Failures {
            first,
            count: usize::MAX,
            errno: libc::ENOMEM,
        }));
    };
    fail_from(1);
    vm.convert(0, PAGE, Private).unwrap_err();
    assert_eq!(block.stats().bytes_quarantined, PAGE);
    let counted = block.stats().quarantines;
    fail_from(0);
    const STORM: usize = 2000;
    for _ in 0..STORM {
        let error = vm.convert(0, PAGE, Shared).unwrap_err();
        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
    }
    let calls = kernel.calls().len();
    assert!(calls < STORM / 2, "{calls} calls");
    assert_eq!(block.stats().quarantines, counted);
    // What another request changes is none of that.
    kernel.fail(None);
    vm.convert(8 * PAGE, PAGE, Private).unwrap();
    // And it ends as soon as it can.
    let healed = (0..1000).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(5));
        vm.convert(0, PAGE, Shared).is_ok()
    });
    assert!(healed && block.stats().bytes_quarantined == 0);
}
