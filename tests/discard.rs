// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that is given back, as for a balloon: nobody's pages go but those that were named, attributes stay, no device
//! keeps an old page, and whatever fails the books are right.

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::kernel::Kernel;
use gmem::{Attribute, Block, BlockConfig, Cause, Gpa, Offset, Span, Vm, WindowConfig};
use proptest::prelude::*;
use std::fs::File;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const HUGE: u64 = 2 << 20;
const PAGES: u64 = 16;
const GPA: u64 = 1 << 30;

const KINDS: [VmKind; 3] = [VmKind::Ordinary, VmKind::Confidential, VmKind::InPlace];

struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    block: Arc<Block>,
    fd: File,
}

impl Rig {
    fn new(kind: VmKind) -> Self {
        let config = match kind {
            VmKind::Ordinary => BlockConfig::new("ram", PAGES * PAGE),
            _ => BlockConfig {
                release_delay: Duration::ZERO,
                ..BlockConfig::confidential("ram", PAGES * PAGE, Shared)
            },
        };
        Self::of(kind, &config)
    }

    fn of(kind: VmKind, config: &BlockConfig) -> Self {
        let kernel = FakeKernel::new(kind);
        kernel.set_pool(4);
        Self::on(kernel, config)
    }

    fn on(kernel: FakeKernel, config: &BlockConfig) -> Self {
        let kernel = Arc::new(kernel);
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let block = Block::new(&vm, config).unwrap();
        let gpas = Span::new(Gpa(GPA), config.size).unwrap();
        kernel.add_slot(gpas, block.file(Shared), 0);
        block.bind(0, config.size, GPA).unwrap().keep();
        Self {
            kernel,
            vm,
            block,
            fd,
        }
    }

    /// Which pages the guest has private, every second one in this pattern; all have memory.
    fn fill(&self, private: &[u64]) {
        for &page in private {
            self.vm.convert(GPA + page * PAGE, PAGE, Private).unwrap();
        }
        self.block.preallocate(1).unwrap();
    }

    /// The guest can do without these bytes, and says so.
    fn discard(&self, offset: u64, size: u64) -> gmem::Result<()> {
        let span = Span::new(Offset(offset), size).unwrap();
        self.kernel.give_up(self.block.file(Shared), span);
        self.block.discard(offset, size)
    }

    fn attribute(&self, page: u64) -> Attribute {
        self.block.run_at(page * PAGE).unwrap().0
    }

    fn has_memory(&self, page: u64) -> bool {
        let file = self.block.file(self.attribute(page));
        self.kernel.has_memory(file, page * PAGE)
    }

    fn check(&self, private: &[u64], without: std::ops::Range<u64>) {
        assert_eq!(self.kernel.violations(), Vec::<String>::new());
        for page in 0..PAGES {
            let is_private = private.contains(&page);
            assert_eq!(self.attribute(page) == Private, is_private, "page {page}");
            assert_eq!(
                self.has_memory(page),
                !without.contains(&page),
                "page {page}"
            );
        }
        let stats = self.block.stats();
        assert_eq!(stats.bytes_private, private.len() as u64 * PAGE);
        assert_eq!(stats.bytes_shared, (PAGES - private.len() as u64) * PAGE);
        assert_eq!((stats.bytes_quarantined, stats.release_failures), (0, 0));
    }
}

fn private_of(kind: VmKind) -> &'static [u64] {
    match kind {
        VmKind::Ordinary => &[],
        _ => &[2, 3, 7, 8, 10],
    }
}

#[test]
fn what_is_discarded_has_no_memory_and_the_same_attribute() {
    for kind in KINDS {
        let rig = Rig::new(kind);
        let private = private_of(kind);
        rig.fill(private);
        rig.check(private, 0..0);
        // Shared, mixed, private.
        for pages in [0..2, 1..9, 7..9, 0..PAGES] {
            let size = (pages.end - pages.start) * PAGE;
            rig.discard(pages.start * PAGE, size).unwrap();
            rig.check(private, pages);
            rig.block.preallocate(1).unwrap();
            rig.check(private, 0..0);
        }
        // What was given back converts as ever.
        rig.discard(0, PAGES * PAGE).unwrap();
        rig.block.reset().unwrap();
        rig.check(&[], 0..PAGES);
    }
}

#[test]
fn senseless_ranges_are_refused() {
    let rig = Rig::new(VmKind::Confidential);
    rig.fill(&[1]);
    for (offset, size) in [
        (0, 0),
        (1, PAGE),
        (0, PAGE + 1),
        (PAGES * PAGE, PAGE),
        (PAGE, PAGES * PAGE),
        (!(PAGE - 1), 2 * PAGE),
    ] {
        let error = rig.block.discard(offset, size).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "{error}");
        assert!(error.to_string().starts_with("ram: "), "{error}");
    }
    rig.check(&[1], 0..0);
}

#[test]
fn what_a_device_has_mapped_stays() {
    for kind in KINDS {
        let rig = Rig::new(kind);
        let private = private_of(kind);
        rig.fill(private);
        let window = rig.block.add_window(
            &rig.fd,
            &WindowConfig {
                ioas_id: 0,
                offset: 0,
                length: PAGES / 2 * PAGE,
                iova: 1 << 32,
                readonly: false,
            },
        );
        let window = window.unwrap();
        let error = rig.discard(PAGE, 2 * PAGE).unwrap_err();
        assert!(matches!(error.cause(), Cause::Busy), "{error}");
        rig.check(private, 0..0);
        // Private pages are in no window, and neither is the other half.
        if !private.is_empty() {
            rig.discard(2 * PAGE, 2 * PAGE).unwrap();
            rig.check(private, 2..4);
            rig.block.preallocate(1).unwrap();
        }
        rig.discard(9 * PAGE, 2 * PAGE).unwrap();
        rig.check(private, 9..11);
        window.remove().unwrap();
        rig.block.preallocate(1).unwrap();
        rig.discard(PAGE, 2 * PAGE).unwrap();
        rig.check(private, 1..3);
    }
}

#[test]
fn poisoned_pages_and_a_detached_vm_are_refused() {
    let rig = Rig::new(VmKind::Confidential);
    rig.fill(&[2]);
    rig.kernel.lose(rig.block.file(Shared), 5 * PAGE);
    rig.block.poison(5 * PAGE, PAGE).unwrap();
    let error = rig.discard(4 * PAGE, 4 * PAGE).unwrap_err();
    assert_eq!(error.errno(), libc::EIO, "{error}");
    assert!(rig.has_memory(4) && rig.has_memory(7));
    rig.block.unbind(0, PAGES * PAGE, GPA).unwrap();
    rig.vm.detach().unwrap();
    let error = rig.discard(0, PAGE).unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY, "{error}");
}

#[test]
fn each_step_may_fail() {
    for kind in KINDS {
        let private = private_of(kind);
        for step in 0.. {
            let rig = Rig::new(kind);
            rig.fill(private);
            rig.kernel.fail(Some(Failures {
                first: step,
                count: 1,
                errno: libc::ENOMEM,
            }));
            let result = rig.discard(0, PAGES * PAGE);
            let calls = rig.kernel.calls().len();
            rig.kernel.fail(None);
            if step >= calls {
                result.unwrap();
                rig.check(private, 0..PAGES);
                assert!(step > 0, "no call was made");
                break;
            }
            assert_eq!(result.unwrap_err().errno(), libc::ENOMEM);
            let gone = (0..PAGES).filter(|&page| !rig.has_memory(page)).count();
            assert!(gone < PAGES as usize);
            // Nothing is in the way of another attempt.
            rig.discard(0, PAGES * PAGE).unwrap();
            rig.check(private, 0..PAGES);
        }
    }
}

#[test]
fn huge_pages_go_whole_and_only_where_they_were_not_promised() {
    for reserve in [false, true] {
        let config = BlockConfig {
            hugetlb: Some(HUGE),
            reserve,
            release_delay: Duration::ZERO,
            ..BlockConfig::confidential("ram", 4 * HUGE, Shared)
        };
        let rig = Rig::of(VmKind::Confidential, &config);
        rig.block.preallocate(1).unwrap();
        assert_eq!(rig.kernel.pool_free(), 0);
        rig.discard(HUGE - PAGE, HUGE + 2 * PAGE).unwrap();
        assert_eq!(rig.kernel.pool_free(), usize::from(!reserve));
        rig.discard(2 * HUGE + PAGE, HUGE / 2).unwrap();
        assert_eq!(rig.kernel.pool_free(), usize::from(!reserve));
        assert_eq!(rig.kernel.violations(), Vec::<String>::new());
        let stats = rig.block.stats();
        assert_eq!(stats.bytes_shared, 4 * HUGE);
        assert_eq!(stats.huge_pages_shared, 4);
    }
}

/// A page fault that finds no huge page would end the VMM.
#[test]
fn what_is_zeroed_in_place_has_memory() {
    let config = BlockConfig {
        hugetlb: Some(HUGE),
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", 4 * HUGE, Shared)
    };
    let rig = Rig::of(VmKind::InPlace, &config);
    rig.vm.convert(GPA + 2 * HUGE, PAGE, Private).unwrap();
    rig.block.preallocate(1).unwrap();
    rig.discard(HUGE, 2 * HUGE).unwrap();
    let has_memory = |offset| rig.kernel.has_memory(rig.block.file(Shared), offset);
    assert!(!has_memory(HUGE) && !has_memory(2 * HUGE));
    // A private page is nobody's to zero.
    rig.discard(2 * HUGE, PAGE).unwrap();
    assert!(!has_memory(2 * HUGE));
    // A whole one between two parts.
    rig.discard(HUGE - PAGE, HUGE + 3 * PAGE).unwrap();
    assert!(has_memory(HUGE - PAGE) && !has_memory(HUGE) && has_memory(2 * HUGE));
    rig.discard(HUGE + PAGE, PAGE).unwrap();
    assert!(has_memory(HUGE));
    // What fails leaves no page to be touched in vain.
    rig.discard(0, HUGE).unwrap();
    rig.kernel.fail(Some(Failures {
        first: 0,
        count: 1,
        errno: libc::ENOSPC,
    }));
    let error = rig.discard(0, PAGE).unwrap_err();
    assert_eq!(error.errno(), libc::ENOSPC, "{error}");
    assert_eq!(rig.kernel.violations(), Vec::<String>::new());
}

/// A conversion at the far end of a huge range waits for its own piece only, and what fails leaves the
/// pieces before it done.
#[test]
fn a_large_range_goes_in_pieces() {
    const SIZE: u64 = 256 << 20;
    let (begun, has_begun) = channel();
    let (go_on, may_go_on) = channel::<()>();
    let ends = Arc::new(Mutex::new(None));
    let armed = ends.clone();
    let kernel = FakeKernel::with_hook(VmKind::InPlace, move |call| {
        if call == "fallocate(PUNCH_HOLE)" {
            let ends: Option<(Sender<()>, Receiver<()>)> = armed.lock().unwrap().take();
            if let Some((begun, may_go_on)) = ends {
                begun.send(()).unwrap();
                may_go_on.recv().unwrap();
            }
        }
    });
    let rig = Rig::on(kernel, &BlockConfig::confidential("ram", SIZE, Shared));
    let file = rig.block.file(Shared);
    let last = SIZE - PAGE;
    for offset in [0, 64 << 20, last] {
        let page = Span::new(Offset(offset), PAGE).unwrap();
        rig.kernel.allocate(file, page).unwrap();
    }
    *ends.lock().unwrap() = Some((begun, may_go_on));
    std::thread::scope(|scope| {
        let discarding = scope.spawn(|| rig.discard(0, SIZE));
        has_begun.recv().unwrap();
        rig.vm.convert(GPA + last, PAGE, Private).unwrap();
        // Not the first piece, nor the second, which has a page that goes; the third does not.
        rig.kernel.fail(Some(Failures {
            first: 1,
            count: 1,
            errno: libc::ENOMEM,
        }));
        go_on.send(()).unwrap();
        let error = discarding.join().unwrap().unwrap_err();
        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
    });
    rig.kernel.fail(None);
    let has_memory = |offset| rig.kernel.has_memory(file, offset);
    assert!(!has_memory(0) && has_memory(last));
    assert_eq!(rig.block.run_at(last).unwrap(), (Private, SIZE));
    rig.discard(0, SIZE).unwrap();
    assert!(!has_memory(64 << 20) && !has_memory(last));
    assert_eq!(rig.kernel.violations(), Vec::<String>::new());
}

/// Who waits meanwhile is the VMM's main loop, and the host gets nothing for it.
#[test]
fn what_would_only_be_zeroed_is_bounded() {
    const GIB: u64 = 1 << 30;
    const MOST: u64 = 32 << 20;
    let cases = [
        (VmKind::Confidential, true),
        (VmKind::Confidential, false),
        (VmKind::InPlace, true),
    ];
    for (kind, reserve) in cases {
        let config = BlockConfig {
            hugetlb: Some(GIB),
            reserve,
            release_delay: Duration::ZERO,
            ..BlockConfig::confidential("ram", 2 * GIB, Shared)
        };
        let kernel = FakeKernel::new(kind);
        kernel.set_pool(1024);
        let rig = Rig::on(kernel, &config);
        rig.kernel.fail(None);
        let error = rig.discard(PAGE, MOST + PAGE).unwrap_err();
        assert_eq!(error.errno(), libc::ENOSPC, "{error}");
        assert_eq!(rig.kernel.calls(), Vec::<&str>::new());
        // Parts of two pages together.
        let error = rig.discard(GIB - MOST / 2, MOST + PAGE).unwrap_err();
        assert_eq!(error.errno(), libc::ENOSPC, "{error}");
        // What is private is not zeroed.
        rig.vm.convert(GPA + PAGE, PAGE, Private).unwrap();
        rig.discard(PAGE, MOST + PAGE).unwrap();
        assert_eq!(rig.kernel.violations(), Vec::<String>::new());
    }
}

proptest! {
    #[test]
    fn any_range_of_any_mixture(
        kind in prop::sample::select(KINDS.to_vec()),
        wanted in prop::collection::btree_set(0..PAGES, 0..10),
        first in 0..PAGES,
        count in 1..=PAGES,
    ) {
        let rig = Rig::new(kind);
        let private: Vec<u64> = match kind {
            VmKind::Ordinary => Vec::new(),
            _ => wanted.into_iter().collect(),
        };
        rig.fill(&private);
        let end = PAGES.min(first + count);
        rig.discard(first * PAGE, (end - first) * PAGE).unwrap();
        rig.check(&private, first..end);
    }
}
