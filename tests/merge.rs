// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a file that converted in place is like when the library lets go of it: without private runs, which some kernels
//! can't take apart, and without a private byte for who has it mapped; whatever the kernel makes of it, the end comes.

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::kernel::{Ioas, Kernel};
use gmem::{Attribute, Block, BlockConfig, Change, DmaSplit, Error, Listener, Vm, WindowConfig};
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
        let iommufd = fd.as_fd();
        let ioas = Ioas { iommufd, id: 0 };
        kernel.ioas_disable_huge_pages(ioas).unwrap();
        let vm = Vm::with_kernel(kernel.clone(), fd.as_raw_fd()).unwrap();
        let config = BlockConfig {
            hugetlb: (size % HUGE == 0).then_some(HUGE),
            dma_split: DmaSplit::Cut,
            ..BlockConfig::confidential("ram", size, Shared)
        };
        let block = Block::new(&vm, &config).unwrap();
        block.bind(0, size, 0).unwrap();
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
    drop(rig.block);
    let rig = Rig {
        block: Rig::new(0).block,
        ..rig
    };
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
    rig.vm.attach(rig.fd.as_raw_fd()).unwrap();
    assert_eq!(rig.block.run_at(0).unwrap(), (Shared, 2 * RUNS * PAGE));
    rig.block.bind(0, 2 * RUNS * PAGE, 0).unwrap();
    rig.vm.convert(0, PAGE, Private).unwrap();
    assert_eq!(rig.kernel.violations(), Vec::<String>::new());
}

#[test]
fn at_the_end_private_bytes_go_and_all_else_stays() {
    let rig = Rig::new(RUNS);
    let size = 2 * RUNS * PAGE;
    let window = WindowConfig {
        iommufd: rig.fd.as_raw_fd(),
        ioas_id: 0,
        offset: 0,
        length: size,
        iova: IOVA,
        readonly: false,
    };
    let _window = rig.block.add_window(&window).unwrap();
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
        refused.iter().all(|e| matches!(e, Error::Busy(_))),
        "{refused:?}"
    );
    // The VMM may still look at what was shared, and not at what was private.
    rig.block.check_access(PAGE, PAGE).unwrap_err();
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
            // What failed because somebody held a page is tried again.
            let failed = usize::from(errno != libc::EAGAIN && first < 2 * RUNS as usize);
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

/// Keeps a conversion waiting.
struct Slow(Mutex<(Sender<()>, Receiver<()>)>);

impl Listener for Slow {
    fn begin(&self, _: &Change) -> Result<(), i32> {
        let ends = self.0.lock().unwrap();
        ends.0.send(()).unwrap();
        ends.1.recv().unwrap();
        Ok(())
    }
    fn end(&self, _: &Change, _: bool) {}
}

#[test]
fn nobody_keeps_a_process_from_its_end() {
    let rig = Rig::new(RUNS);
    let (begun, has_begun) = channel();
    let (go_on, may_go_on) = channel();
    let slow = Slow(Mutex::new((begun, may_go_on)));
    rig.block.add_listener(Arc::new(slow));
    std::thread::scope(|scope| {
        let vm = &rig.vm;
        let converting = scope.spawn(move || vm.convert(PAGE, PAGE, Private));
        has_begun.recv().unwrap();
        let start = Instant::now();
        let error = rig.vm.end().unwrap_err();
        assert!(matches!(error, Error::Busy(_)), "{error}");
        assert!(start.elapsed() >= Duration::from_millis(500));
        go_on.send(()).unwrap();
        converting.join().unwrap().unwrap();
    });
    let error = rig.vm.convert(PAGE, PAGE, Shared).unwrap_err();
    assert!(matches!(error, Error::Busy(_)), "{error}");
}
