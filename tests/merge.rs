// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a file that converted in place is like when the library lets go of it: without private runs, which some kernels
//! can't take apart, and without a private byte for who has it mapped; whatever the kernel makes of it, the end comes.

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::kernel::{Ioas, Kernel};
use gmem::{
    Attribute, Block, BlockConfig, Cause, Change, DmaSplit, Listener, MemoryFault, Offset, Span,
    Vm, Window, WindowConfig,
};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const HUGE: u64 = 2 << 20;
const RUNS: u64 = 40;
/// So few are left alone.
const FEW: u64 = 16;
const CONVERT: &str = "KVM_SET_MEMORY_ATTRIBUTES2";
const IOVA: u64 = 1 << 32;

struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    block: Arc<Block>,
    fd: File,
}

impl Rig {
    /// A block with so many private pages, each between shared ones, and memory everywhere.
    fn new(runs: u64) -> Self {
        Self::on(FakeKernel::new(VmKind::InPlace), 2 * RUNS * PAGE, runs)
    }

    fn on(kernel: FakeKernel, size: u64, runs: u64) -> Self {
        let kernel = Arc::new(kernel);
        kernel.set_pool(4);
        let fd = File::open("/dev/null").unwrap();
        for id in [0, 1] {
            let iommufd = fd.as_fd();
            kernel
                .ioas_disable_huge_pages(Ioas { iommufd, id })
                .unwrap();
        }
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let config = BlockConfig {
            hugetlb: (size % HUGE == 0).then_some(HUGE),
            dma_split: DmaSplit::Cut,
            release_delay: Duration::ZERO,
            ..BlockConfig::confidential("ram", size, Shared)
        };
        let block = Block::new(&vm, &config).unwrap();
        block.bind(0, size, 0).unwrap().keep();
        block.preallocate(1).unwrap();
        for run in 0..runs {
            vm.convert(2 * run * PAGE, PAGE, Private).unwrap();
        }
        Self {
            kernel,
            vm,
            block,
            fd,
        }
    }

    fn show(&self, ioas_id: u32, length: u64) -> Window {
        let window = WindowConfig {
            ioas_id,
            offset: 0,
            length,
            iova: IOVA,
            readonly: false,
        };
        self.block.add_window(&self.fd, &window).unwrap()
    }

    /// Its block has ended.
    fn without_block(self) -> Self {
        drop(self.block);
        Self {
            block: Self::new(0).block,
            ..self
        }
    }

    fn file(&self) -> RawFd {
        self.block.file(Private).as_raw_fd()
    }

    /// Pages with memory, and private ones, of a file that may be closed.
    fn left(&self, file: RawFd) -> (usize, usize) {
        let files = self.kernel.snapshot().1;
        let found = files.iter().find(|(fd, ..)| *fd == file);
        found.map_or((0, 0), |(_, pages, private)| (pages.len(), private.len()))
    }

    fn conversions(&self) -> usize {
        let calls = self.kernel.calls();
        calls.iter().filter(|call| **call == CONVERT).count()
    }
}

#[test]
fn a_block_that_ends_leaves_a_file_without_runs_and_without_a_private_byte() {
    let rig = Rig::new(RUNS);
    let file = rig.file();
    assert_eq!(rig.left(file), (2 * RUNS as usize, RUNS as usize));
    rig.kernel.fail(None);
    let rig = rig.without_block();
    assert_eq!(rig.left(file), (RUNS as usize, 0), "what was shared is all");
    assert_eq!(rig.kernel.violations(), Vec::<String>::new());
}

#[test]
fn few_runs_cost_nothing() {
    for (runs, conversions) in [(FEW, 0), (FEW + 1, FEW as usize + 1)] {
        let rig = Rig::new(runs);
        rig.kernel.fail(None);
        rig.vm.end().unwrap();
        assert_eq!(rig.conversions(), conversions);
    }
}

#[test]
fn a_vm_that_is_rebuilt_closes_files_without_runs() {
    let rig = Rig::new(RUNS);
    rig.vm.detach().unwrap();
    assert_eq!(rig.kernel.runs_at_close(), [0]);
    rig.kernel.rebuild_vm();
    rig.vm.attach(&rig.fd).unwrap();
    assert_eq!(rig.block.run_at(0).unwrap(), (Shared, 2 * RUNS * PAGE));
    rig.block.bind(0, 2 * RUNS * PAGE, 0).unwrap().keep();
    rig.vm.convert(0, PAGE, Private).unwrap();
    assert_eq!(rig.kernel.violations(), Vec::<String>::new());
}

#[test]
fn at_the_end_private_bytes_go_and_all_else_stays() {
    let rig = Rig::new(RUNS);
    let size = 2 * RUNS * PAGE;
    let _window = rig.show(0, size);
    let file = rig.file();
    let seen = rig.kernel.snapshot().2;
    rig.vm.end().unwrap();
    assert_eq!(rig.left(file), (RUNS as usize, 0));
    assert_eq!(rig.kernel.snapshot().2, seen, "devices keep what they have");
    assert_eq!(rig.kernel.mapped(rig.block.host()), Some(file));
    let refused = [
        rig.vm.convert(0, PAGE, Shared).unwrap_err(),
        rig.vm.convert(PAGE, PAGE, Private).unwrap_err(),
        rig.block.memslot(0).unwrap_err(),
    ];
    assert!(
        refused.iter().all(|e| matches!(e.cause(), Cause::Ended)),
        "{refused:?}"
    );
    // The VMM may still look at what was shared, and not at what was private.
    rig.block.check_access(PAGE, PAGE).unwrap();
    let error = rig.block.check_access(0, PAGE).unwrap_err();
    assert_eq!(error.errno(), libc::EACCES, "{error}");
    rig.kernel.fail(None);
    rig.vm.end().unwrap();
    drop(_window);
    drop(rig.block);
    assert!(!rig.kernel.calls().contains(&CONVERT), "once is enough");
    assert_eq!(rig.kernel.violations(), Vec::<String>::new());
}

#[test]
fn huge_pages_with_a_private_part_go_as_a_whole() {
    let rig = Rig::on(FakeKernel::new(VmKind::InPlace), 2 * HUGE, RUNS);
    let file = rig.file();
    let per_page = (HUGE / PAGE) as usize;
    assert_eq!(rig.left(file), (2 * per_page, RUNS as usize));
    rig.vm.end().unwrap();
    assert_eq!(rig.left(file), (per_page, 0));
}

#[test]
fn whatever_call_fails_the_others_are_made_and_the_end_comes() {
    for errno in [libc::ENOMEM, libc::EAGAIN, libc::EIO] {
        for first in 0.. {
            let rig = Rig::new(RUNS);
            let file = rig.file();
            let count = 1;
            rig.kernel.fail(Some(Failures {
                first,
                count,
                errno,
            }));
            rig.vm.end().unwrap();
            let calls = rig.kernel.calls().len();
            rig.kernel.fail(None);
            // What failed because somebody held a page is tried again. The last of a run's three calls
            // finds it ended.
            let ends = first < 3 * RUNS as usize && first % 3 < 2;
            let failed = usize::from(errno != libc::EAGAIN && ends);
            assert_eq!(rig.left(file).1, failed, "call {first}: {errno}");
            if calls <= first {
                break;
            }
        }
    }
}

#[test]
fn what_never_succeeds_is_not_tried_for_ever() {
    let rig = Rig::new(RUNS);
    rig.kernel.fail(Some(Failures {
        first: 0,
        count: usize::MAX,
        errno: libc::EAGAIN,
    }));
    rig.vm.end().unwrap();
    let calls = rig.kernel.calls().len();
    assert!(calls < 100, "{calls} calls");
}

/// A run of huge pages that the kernel leaves half-way is not begun anew.
#[test]
fn the_kernel_goes_on_where_it_stopped() {
    for errno in [libc::EAGAIN, libc::EINTR] {
        let rig = Rig::on(FakeKernel::new(VmKind::InPlace), 4 * HUGE, RUNS);
        let (file, rest) = (rig.file(), 3 * HUGE);
        rig.vm.convert(HUGE, rest, Private).unwrap();
        // A hole, a conversion and another hole for each run before the last.
        let first = 3 * RUNS as usize + 1;
        let count = 1;
        rig.kernel.fail(Some(Failures {
            first,
            count,
            errno,
        }));
        rig.vm.end().unwrap();
        assert_eq!(rig.left(file).1, 0);
        let asked = rig.kernel.asked();
        let ends = [(HUGE, rest), (2 * HUGE, rest - HUGE)];
        let ends = ends.map(|(first, size)| Span::new(Offset(first), size).unwrap());
        assert_eq!(asked[asked.len() - 2..], ends, "errno {errno}");
        assert_eq!(asked.len() as u64, RUNS + 2);
        assert_eq!(rig.block.stats().resumed, 1);
        assert_eq!(rig.kernel.violations(), Vec::<String>::new());
    }
}

#[test]
fn signals_keep_nobody_from_the_end() {
    let rig = Rig::new(RUNS);
    rig.kernel.fail(Some(Failures {
        first: 0,
        count: usize::MAX,
        errno: libc::EINTR,
    }));
    rig.vm.end().unwrap();
    let calls = rig.kernel.calls().len();
    assert!(calls < 1000 + 2 * RUNS as usize, "{calls} calls");
}

/// Keeps a conversion waiting.
struct Slow(Mutex<(Sender<()>, Receiver<()>)>);

impl Listener for Slow {
    fn begin(&self, _: &Change) -> Result<(), i32> {
        let ends = self.0.lock().unwrap();
        // Later conversions than the first find nobody at the other ends.
        let _ = ends.0.send(());
        let _ = ends.1.recv();
        Ok(())
    }
    fn end(&self, _: &Change, _: bool) {}
}

/// While a page of `block` converts at `gpa`.
fn beside_a_conversion(vm: &Vm, block: &Block, gpa: u64, act: impl FnOnce()) {
    let (begun, has_begun) = channel();
    let (go_on, may_go_on) = channel();
    let slow = Slow(Mutex::new((begun, may_go_on)));
    let listener = block.add_listener(Arc::new(slow));
    std::thread::scope(|scope| {
        let converting = scope.spawn(move || vm.convert(gpa, PAGE, Private));
        has_begun.recv().unwrap();
        act();
        go_on.send(()).unwrap();
        converting.join().unwrap().unwrap();
        drop(go_on);
    });
    drop(listener);
}

#[test]
fn nobody_keeps_a_process_from_its_end() {
    let rig = Rig::new(RUNS);
    beside_a_conversion(&rig.vm, &rig.block, PAGE, || {
        let start = Instant::now();
        let error = rig.vm.end().unwrap_err();
        assert!(matches!(error.cause(), Cause::Busy), "{error}");
        assert!(start.elapsed() >= Duration::from_millis(500));
        // Who comes now does not wait for the bindings, and keeps nobody from them.
        let error = rig.vm.convert(PAGE, PAGE, Shared).unwrap_err();
        assert!(matches!(error.cause(), Cause::Ended), "{error}");
        let fault = rig.vm.memory_fault(PAGE, PAGE, Shared, true, 0);
        assert!(matches!(fault, MemoryFault::Later(_)), "{fault:?}");
    });
    assert_eq!(rig.left(rig.file()).1, RUNS as usize + 1);
}

#[test]
fn an_end_that_came_too_early_is_made_up_for() {
    for again in [true, false] {
        let rig = Rig::new(RUNS);
        let file = rig.file();
        // It makes one run of the first two.
        beside_a_conversion(&rig.vm, &rig.block, PAGE, || {
            rig.vm.end().unwrap_err();
        });
        assert_eq!(rig.left(file).1, RUNS as usize + 1);
        if again {
            rig.vm.end().unwrap();
            assert_eq!(rig.left(file), (RUNS as usize - 1, 0));
            rig.kernel.fail(None);
            rig.vm.end().unwrap();
            assert_eq!(rig.conversions(), 0, "once is enough");
        }
        let rig = rig.without_block();
        assert_eq!(rig.left(file), (RUNS as usize - 1, 0));
    }
}

/// Neither finds it in the VM's list, nor may it go by what the VM has become.
#[test]
fn a_block_that_ends_beside_a_detach_leaves_no_runs() {
    for _ in 0..20 {
        let rig = Rig::new(RUNS);
        let file = rig.file();
        let config = BlockConfig::confidential("other", PAGE, Shared);
        let other = Block::new(&rig.vm, &config).unwrap();
        let gpa = 1 << 30;
        other.bind(0, PAGE, gpa).unwrap().keep();
        let Rig {
            kernel,
            vm,
            block,
            fd,
        } = rig;
        std::thread::scope(|scope| {
            let ends = Arc::downgrade(&block);
            beside_a_conversion(&vm, &other, gpa, || {
                scope.spawn(|| vm.detach().unwrap());
                let ending = scope.spawn(move || drop(block));
                // It ends by itself now, beside the detach or after it, or the detach has it, too.
                while ends.strong_count() > 0 && !ending.is_finished() {
                    std::thread::yield_now();
                }
            });
        });
        let rig = Rig {
            kernel,
            vm,
            block: other,
            fd,
        };
        assert_eq!(rig.left(file).1, 0);
        // If the detach did meet it after all, its file is one of these.
        let closed = rig.kernel.runs_at_close();
        assert!(closed.iter().all(|&runs| runs <= FEW as usize));
    }
}

#[test]
fn a_reset_after_the_end_converts_nothing() {
    let rig = Rig::new(RUNS);
    rig.vm.end().unwrap();
    rig.kernel.fail(None);
    let error = rig.block.reset().unwrap_err();
    assert!(matches!(error.cause(), Cause::Ended), "{error}");
    assert_eq!(rig.kernel.calls(), Vec::<&str>::new());
    assert_eq!(rig.block.stats().bytes_private, RUNS * PAGE);
}

/// A device that can't be parted from a huge page keeps the memory that the file has.
#[test]
fn huge_pages_that_a_device_keeps_stay_the_files() {
    let rig = Rig::on(FakeKernel::new(VmKind::InPlace), 2 * HUGE, RUNS);
    let file = rig.file();
    let windows = [0, 1].map(|ioas_id| rig.show(ioas_id, 2 * HUGE));
    let before = rig.left(file);
    rig.kernel.fail(Some(Failures {
        first: 0,
        count: 1,
        errno: libc::EBUSY,
    }));
    rig.vm.end().unwrap();
    assert_eq!(rig.left(file), before);
    assert!(windows.iter().any(|window| window.mapped().0 != 0));
    // The next attempt succeeds.
    rig.kernel.fail(None);
    rig.vm.end().unwrap();
    assert_eq!(rig.left(file), ((HUGE / PAGE) as usize, 0));
    assert_eq!(windows.each_ref().map(|window| window.mapped().0), [0, 0]);
    assert_eq!(rig.kernel.violations(), Vec::<String>::new());
}

/// What somebody else does at the beginning of a kernel call.
type Deed = Box<dyn Fn(&str) + Send>;

/// A kernel, and the deed that can be set for it.
fn disturbed() -> (FakeKernel, Arc<Mutex<Option<Deed>>>) {
    let deed: Arc<Mutex<Option<Deed>>> = Arc::default();
    let hook = deed.clone();
    let kernel = FakeKernel::with_hook(VmKind::InPlace, move |call| {
        // Not in calls that a deed makes, or waits for.
        if let Ok(deed) = hook.try_lock() {
            if let Some(deed) = &*deed {
                deed(call);
            }
        }
    });
    (kernel, deed)
}

/// As long as a page is private, KVM gives a vCPU that touches it new memory.
#[test]
fn what_a_vcpu_writes_while_runs_end_does_not_stay_in_the_file() {
    for (size, left) in [(2 * RUNS * PAGE, RUNS), (2 * HUGE, HUGE / PAGE)] {
        let (kernel, deed) = disturbed();
        let rig = Rig::on(kernel, size, RUNS);
        let (kernel, block) = (rig.kernel.clone(), rig.block.clone());
        *deed.lock().unwrap() = Some(Box::new(move |call| {
            let file = block.file(Private);
            for run in (0..RUNS).filter(|_| call == CONVERT) {
                let page = Span::new(Offset(2 * run * PAGE), PAGE).unwrap();
                if kernel.is_private_in(file, page.first()) {
                    kernel.allocate(file, page).unwrap();
                }
            }
        }));
        rig.vm.end().unwrap();
        *deed.lock().unwrap() = None;
        assert_eq!(rig.left(rig.file()), (left as usize, 0));
    }
}

/// Who has a range when the end comes is waited for: what that makes private again is found.
#[test]
fn nothing_is_made_private_after_the_end() {
    let (kernel, deed) = disturbed();
    let rig = Rig::on(kernel, 2 * RUNS * PAGE, RUNS);
    let end = Arc::new(Mutex::new(None));
    *deed.lock().unwrap() = Some(Box::new({
        let (vm, block, end) = (rig.vm.clone(), rig.block.clone(), end.clone());
        let conversions = Mutex::new(0);
        move |call| {
            *conversions.lock().unwrap() += u64::from(call == CONVERT);
            // All runs are shared and filled, and about to be private again.
            if *conversions.lock().unwrap() != RUNS + 1 || end.lock().unwrap().is_some() {
                return;
            }
            let vm = vm.clone();
            *end.lock().unwrap() = Some(std::thread::spawn(move || vm.end()));
            while block.memslot(0).is_ok() {
                std::thread::yield_now();
            }
        }
    }));
    let image = vec![7; (2 * RUNS * PAGE) as usize];
    rig.block.place(0, &image).unwrap();
    *deed.lock().unwrap() = None;
    let end = end.lock().unwrap().take().unwrap();
    end.join().unwrap().unwrap();
    assert_eq!(rig.left(rig.file()), (RUNS as usize, 0));
}

/// And who has it for longer keeps only that block from its end, which its name tells.
#[test]
fn a_range_that_is_not_to_be_had_keeps_no_other_block() {
    let (kernel, deed) = disturbed();
    let rig = Rig::on(kernel, 2 * RUNS * PAGE, RUNS);
    let config = BlockConfig::confidential("other", 2 * RUNS * PAGE, Shared);
    let other = Block::new(&rig.vm, &config).unwrap();
    let gpa = 1 << 30;
    other.bind(0, 2 * RUNS * PAGE, gpa).unwrap().keep();
    for run in 0..RUNS {
        rig.vm.convert(gpa + 2 * run * PAGE, PAGE, Private).unwrap();
    }
    let other_file = other.file(Private).as_raw_fd();
    let told = Arc::new(Mutex::new(None));
    *deed.lock().unwrap() = Some(Box::new({
        let (vm, told) = (rig.vm.clone(), told.clone());
        move |_| {
            if told.lock().unwrap().is_none() {
                let vm = vm.clone();
                let ended = std::thread::spawn(move || vm.end());
                *told.lock().unwrap() = Some(ended.join().unwrap());
            }
        }
    }));
    rig.block.discard(PAGE, PAGE).unwrap();
    *deed.lock().unwrap() = None;
    let error = told.lock().unwrap().take().unwrap().unwrap_err();
    assert!(matches!(error.cause(), Cause::Busy), "{error}");
    assert!(error.to_string().contains("ram:"), "{error}");
    assert_eq!(rig.left(other_file).1, 0);
    assert_eq!(rig.left(rig.file()).1, RUNS as usize);
    rig.vm.end().unwrap();
    assert_eq!(rig.left(rig.file()).1, 0);
}
