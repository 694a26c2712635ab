// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that pages leave is kept for a while: what that saves, and when it is over.

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::kernel::{Ioas, Kernel};
use gmem::Attribute::{Private, Shared};
use gmem::{Attribute, Block, BlockConfig, Cause, DmaSplit, Vm, Window, WindowConfig};
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PAGE: u64 = gmem::PAGE_SIZE;
const HUGE: u64 = 2 << 20;
const SIZE: u64 = 16 * PAGE;
/// Nothing is released by itself in a test.
const LONG: Duration = Duration::from_secs(3600);
/// And here soon.
const SHORT: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(60);

struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    block: Arc<Block>,
    fd: File,
}

fn keeping(delay: Duration) -> BlockConfig {
    BlockConfig {
        release_delay: delay,
        keeps_private: true,
        dma_split: DmaSplit::Cut,
        ..BlockConfig::confidential("ram", SIZE, Shared)
    }
}

impl Rig {
    fn new(config: &BlockConfig) -> Self {
        Self::on(FakeKernel::new(VmKind::Confidential), config)
    }

    fn on(kernel: FakeKernel, config: &BlockConfig) -> Self {
        let kernel = Arc::new(kernel);
        let fd = File::open("/dev/null").unwrap();
        let ioas = Ioas {
            iommufd: fd.as_fd(),
            id: 0,
        };
        kernel.ioas_disable_huge_pages(ioas).unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let block = Block::new(&vm, config).unwrap();
        block.bind(0, config.size, 0).unwrap().keep();
        Self {
            kernel,
            vm,
            block,
            fd,
        }
    }

    /// Four huge pages of which a pool has so many, all private.
    fn huge(pool: usize) -> Self {
        let config = BlockConfig {
            hugetlb: Some(HUGE),
            release_delay: LONG,
            ..BlockConfig::confidential("ram", 4 * HUGE, Private)
        };
        let kernel = FakeKernel::new(VmKind::Confidential);
        kernel.set_pool(pool);
        Self::on(kernel, &config)
    }

    fn window(&self) -> Window {
        let config = WindowConfig {
            ioas_id: 0,
            offset: 0,
            length: self.block.stats().size,
            iova: 1 << 32,
            readonly: false,
        };
        self.block.add_window(&self.fd, &config).unwrap()
    }

    fn convert(&self, first: u64, count: u64, attribute: Attribute) {
        self.vm
            .convert(first * PAGE, count * PAGE, attribute)
            .unwrap();
    }

    /// The calls that a conversion makes.
    fn calls(&self, first: u64, count: u64, attribute: Attribute) -> Vec<&'static str> {
        let none = Failures {
            first: usize::MAX,
            count: 0,
            errno: 0,
        };
        self.kernel.fail(Some(none));
        self.convert(first, count, attribute);
        let calls = self.kernel.calls();
        self.kernel.fail(None);
        calls
    }

    fn has(&self, page: u64, plane: Attribute) -> bool {
        self.kernel.has_memory(self.block.file(plane), page * PAGE)
    }

    /// By page.
    fn memory(&self, plane: Attribute) -> Vec<u64> {
        let pages = 0..self.block.stats().size / PAGE;
        pages.filter(|&page| self.has(page, plane)).collect()
    }

    fn double(&self) -> u64 {
        self.block.stats().double_bytes / PAGE
    }
}

#[test]
fn a_page_that_comes_back_costs_neither_a_hole_nor_memory() {
    for device in [false, true] {
        let rig = Rig::new(&keeping(LONG));
        let _window = device.then(|| rig.window());
        // Shared pages have memory only from when one was asked for.
        rig.convert(3, 1, Private);
        rig.convert(3, 1, Shared);
        for _ in 0..3 {
            let out: &[&str] = match device {
                true => &["IOMMU_IOAS_UNMAP", "KVM_SET_MEMORY_ATTRIBUTES"],
                false => &["KVM_SET_MEMORY_ATTRIBUTES"],
            };
            assert_eq!(rig.calls(3, 1, Private), out);
            assert_eq!((rig.double(), rig.has(3, Shared)), (1, true));
            let back: &[&str] = match device {
                true => &["IOMMU_IOAS_MAP_FILE", "KVM_SET_MEMORY_ATTRIBUTES"],
                false => &["KVM_SET_MEMORY_ATTRIBUTES"],
            };
            assert_eq!(rig.calls(3, 1, Shared), back);
            assert!(rig.has(3, Shared));
        }
        assert!(rig.block.stats().releases_cancelled >= 6);
        assert_eq!(rig.kernel.violations(), Vec::<String>::new());
    }
}

#[test]
fn private_memory_is_kept_only_where_it_may_be() {
    let config = BlockConfig {
        keeps_private: false,
        ..keeping(LONG)
    };
    let rig = Rig::new(&config);
    rig.convert(3, 1, Private);
    rig.block.preallocate(1).unwrap();
    assert!(rig.has(3, Private));
    rig.convert(3, 1, Shared);
    assert!(!rig.has(3, Private));
    let rig = Rig::new(&keeping(LONG));
    rig.convert(3, 1, Private);
    rig.block.preallocate(1).unwrap();
    rig.convert(3, 1, Shared);
    assert!(rig.has(3, Private));
    rig.convert(3, 1, Private);
    assert!(rig.has(3, Private));
    assert!(rig.double() <= 1);
}

#[test]
fn what_nobody_comes_back_for_is_released_by_itself_and_what_came_back_is_not() {
    let rig = Rig::new(&keeping(SHORT));
    rig.convert(0, 16, Private);
    rig.convert(0, 16, Shared);
    rig.convert(2, 7, Private);
    let start = Instant::now();
    while rig.double() != 0 {
        assert!(
            start.elapsed() < PATIENCE,
            "{} pages are kept",
            rig.double()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(rig.memory(Shared), [0, 1, 9, 10, 11, 12, 13, 14, 15]);
    assert_eq!(rig.memory(Private), []);
}

#[test]
fn what_is_beyond_the_bound_is_released_at_once() {
    let config = BlockConfig {
        max_pending: 4 * PAGE,
        ..keeping(LONG)
    };
    let rig = Rig::new(&config);
    rig.convert(0, 16, Private);
    rig.convert(0, 16, Shared);
    rig.convert(0, 3, Private);
    assert_eq!((rig.double(), rig.memory(Shared).len()), (3, 16));
    rig.convert(3, 2, Private);
    assert_eq!((rig.double(), rig.memory(Shared).len()), (3, 14));
    rig.convert(5, 1, Private);
    assert_eq!((rig.double(), rig.memory(Shared).len()), (4, 14));
    rig.convert(5, 11, Private);
    assert_eq!((rig.double(), rig.memory(Shared).len()), (4, 4));
}

#[test]
fn a_reset_a_rebuild_a_discard_and_whoever_asks_end_it() {
    let of = |end: fn(&Rig)| {
        let rig = Rig::new(&keeping(LONG));
        rig.convert(0, 16, Private);
        rig.block.preallocate(1).unwrap();
        rig.convert(0, 16, Shared);
        rig.convert(2, 3, Private);
        assert!(rig.double() >= 3);
        end(&rig);
        assert_eq!(rig.double(), 0);
        for page in 0..16 {
            assert!(!(rig.has(page, Shared) && rig.has(page, Private)), "{page}");
        }
        rig
    };
    let rig = of(|rig| rig.block.release_pending());
    assert_eq!(rig.memory(Private), [2, 3, 4]);
    // What comes after these finds nothing of before.
    let ends: [fn(&Rig); 3] = [
        |rig| rig.block.reset().unwrap(),
        |rig| rig.block.discard(0, SIZE).unwrap(),
        |rig| {
            rig.vm.detach().unwrap();
            rig.vm.attach(&rig.fd).unwrap();
        },
    ];
    for end in ends {
        assert_eq!(of(end).memory(Private), []);
    }
}

#[test]
fn a_page_that_was_never_reserved_is_when_it_comes_back() {
    let rig = Rig::new(&keeping(LONG));
    assert_eq!(rig.memory(Shared), []);
    rig.convert(3, 1, Private);
    rig.convert(3, 1, Shared);
    assert_eq!(rig.memory(Shared), [3]);
    // What was given back is not there any more.
    rig.block.discard(3 * PAGE, PAGE).unwrap();
    rig.convert(3, 1, Private);
    rig.convert(3, 1, Shared);
    assert_eq!(rig.memory(Shared), [3]);
}

#[test]
fn short_memory_ends_it() {
    let rig = Rig::huge(2);
    let page = HUGE / PAGE;
    for huge in [0, 1] {
        rig.convert(huge * page, 1, Shared);
        rig.convert(huge * page, 1, Private);
    }
    assert_eq!((rig.kernel.pool_free(), rig.double()), (0, 2 * page));
    // Both are kept, and the pool is empty: one request more takes what it needs.
    rig.convert(2 * page, 1, Shared);
    assert_eq!((rig.kernel.pool_free(), rig.double()), (1, 0));
    rig.convert(0, 1, Shared);
    let error = rig.vm.convert(3 * HUGE, PAGE, Shared).unwrap_err();
    assert!(matches!(error.cause(), Cause::PoolEmpty(_)), "{error:?}");
}

#[test]
fn a_huge_page_stays_for_those_who_come_back_and_is_taken_once() {
    let rig = Rig::huge(4);
    assert!(rig.calls(0, 1, Shared).contains(&"fallocate"));
    for page in 1..8 {
        assert!(!rig.calls(page, 1, Shared).contains(&"fallocate"));
    }
    for page in 0..8 {
        let calls = rig.calls(page, 1, Private);
        assert_eq!(calls, ["KVM_SET_MEMORY_ATTRIBUTES"], "{page}");
    }
    assert_eq!(rig.kernel.pool_free(), 3);
    assert!(!rig.calls(5, 1, Shared).contains(&"fallocate"));
    rig.block.release_pending();
    assert_eq!(rig.kernel.pool_free(), 3, "one page of it is shared");
    rig.convert(5, 1, Private);
    rig.block.release_pending();
    assert_eq!(rig.kernel.pool_free(), 4);
}

#[test]
fn a_release_that_fails_is_counted_and_made_up_for() {
    let rig = Rig::new(&keeping(LONG));
    rig.convert(0, 16, Private);
    rig.convert(0, 16, Shared);
    rig.convert(4, 2, Private);
    rig.kernel
        .fail_if(|call| (call == "fallocate(PUNCH_HOLE)").then_some(libc::EIO));
    rig.block.release_pending();
    rig.kernel.fail(None);
    let stats = rig.block.stats();
    assert!(stats.release_failures > 0);
    assert_eq!((stats.double_bytes, rig.has(4, Shared)), (0, true));
    rig.convert(4, 2, Shared);
    rig.convert(4, 2, Private);
    rig.block.release_pending();
    assert!(!rig.has(4, Shared));
}

/// Whatever is released beside them, pages that are shared at last have their memory, and private ones
/// of both planes none.
#[test]
fn racing_conversions_lose_no_memory() {
    let rig = Rig::new(&keeping(SHORT));
    let _window = rig.window();
    rig.convert(0, 16, Private);
    rig.convert(0, 16, Shared);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let rig = &rig;
            scope.spawn(move || {
                let start = Instant::now();
                for round in 0.. {
                    rig.convert(4 * thread, 3, Private);
                    if round % 16 == 0 {
                        std::thread::sleep(SHORT);
                    }
                    rig.convert(4 * thread, 3, Shared);
                    for page in 4 * thread..4 * thread + 4 {
                        assert!(rig.has(page, Shared), "page {page} in round {round}");
                    }
                    if start.elapsed() > Duration::from_millis(300) {
                        break;
                    }
                }
            });
        }
        scope.spawn(|| (0..50).for_each(|_| rig.block.release_pending()));
    });
    assert_eq!(rig.memory(Shared).len(), 16);
    assert_eq!(rig.kernel.violations(), Vec::<String>::new());
}

#[test]
fn the_bound_is_told_as_it_holds() {
    let told = |delay| {
        let stats = Rig::new(&keeping(delay)).block.stats();
        (stats.release_delay_ms, stats.max_pending)
    };
    assert_eq!(told(Duration::from_millis(100)), (100, 64 << 20));
    // Where nothing is kept nothing is bounded.
    assert_eq!(told(Duration::ZERO), (0, 0));
}

#[test]
fn in_place_there_is_nothing_to_keep() {
    let rig = Rig::on(
        FakeKernel::new(VmKind::InPlace),
        &BlockConfig {
            dma_split: DmaSplit::default(),
            ..keeping(LONG)
        },
    );
    rig.convert(0, 8, Private);
    rig.convert(2, 3, Shared);
    assert_eq!((rig.double(), rig.block.stats().releases_cancelled), (0, 0));
}

#[test]
fn what_is_quarantined_heals_by_itself() {
    let rig = Rig::new(&keeping(LONG));
    let _window = rig.window();
    rig.kernel.fail_if(|call| {
        (call.contains("UNMAP") || call.contains("ATTRIBUTES")).then_some(libc::EBUSY)
    });
    rig.vm.convert(0, PAGE, Private).unwrap_err();
    rig.convert(8, 4, Shared);
    rig.kernel.fail(None);
    rig.convert(8, 4, Private);
    // The way back of this one fails: nothing maps what is to be shared again.
    rig.kernel.fail_if(|call| {
        (call.contains("MAP_FILE") || call == "KVM_SET_MEMORY_ATTRIBUTES").then_some(libc::ENOMEM)
    });
    rig.vm.convert(2 * PAGE, 2 * PAGE, Private).unwrap_err();
    rig.kernel.fail(None);
    assert_eq!(rig.block.stats().bytes_quarantined, 2 * PAGE);
    let start = Instant::now();
    while rig.block.stats().bytes_quarantined != 0 {
        assert!(start.elapsed() < PATIENCE, "nobody looks after it");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(rig.block.stats().heals, 1);
    assert_eq!(rig.block.stats().bytes_dma_mapped, 12 * PAGE);
}

#[test]
fn a_part_of_a_kept_huge_page_that_is_given_back_takes_all_of_it_along() {
    let rig = Rig::huge(4);
    rig.convert(0, 1, Shared);
    rig.convert(0, 1, Private);
    assert_eq!((rig.kernel.pool_free(), rig.double()), (3, HUGE / PAGE));
    rig.block.discard(7 * PAGE, PAGE).unwrap();
    assert_eq!((rig.kernel.pool_free(), rig.double()), (4, 0));
}

#[test]
fn no_block_waits_for_what_another_one_keeps_for_long() {
    let rig = Rig::new(&keeping(LONG));
    rig.convert(0, 1, Private);
    // Upkeep has seen by then that this one takes its time.
    std::thread::sleep(Duration::from_millis(200));
    let other = Block::new(&rig.vm, &keeping(SHORT)).unwrap();
    other.bind(0, SIZE, SIZE).unwrap().keep();
    rig.convert(16, 1, Private);
    let start = Instant::now();
    while other.stats().double_bytes != 0 {
        assert!(start.elapsed() < PATIENCE, "it waits for the other block");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(rig.double(), 1);
}

#[test]
fn no_delay_is_too_long() {
    let rig = Rig::new(&keeping(Duration::MAX));
    rig.convert(0, 1, Private);
    rig.vm.look_after(Duration::from_secs(1));
    assert_eq!(rig.double(), 1);
    drop(rig);
}

#[test]
fn of_huge_pages_that_the_kernel_finds_only_pages_that_left_just_now_are_kept() {
    let kernel = FakeKernel::new(VmKind::Confidential);
    kernel.set_transparent_huge_page(HUGE);
    let config = BlockConfig {
        dma_split: DmaSplit::Page,
        release_delay: LONG,
        ..BlockConfig::confidential("ram", 2 * HUGE, Private)
    };
    let rig = Rig::on(kernel, &config);
    // Alone in its huge page, which goes with it.
    rig.convert(3, 1, Shared);
    rig.convert(3, 1, Private);
    assert_eq!((rig.double(), rig.has(3, Shared)), (0, false));
    rig.convert(2, 3, Shared);
    rig.convert(3, 1, Private);
    assert_eq!((rig.double(), rig.has(3, Shared)), (1, true));
    rig.convert(2, 3, Private);
    assert_eq!(rig.double(), 0);
    assert_eq!(rig.memory(Shared), []);
}
