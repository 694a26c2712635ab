// SPDX-License-Identifier: MIT OR Apache-2.0
//! DMA windows whose kernel fails: what devices reach is what the books say, nothing is kept for ever,
//! and an errno says what was wrong.

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::kernel::{DeviceAccess, Ioas, Kernel};
use gmem::{
    Attribute, Block, BlockConfig, DmaSplit, Gpa, Iova, Offset, Span, StrategyKind, Vm,
    WindowConfig,
};
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const SIZE: u64 = 16 * PAGE;
const IOVA: u64 = 1 << 32;

struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    block: Arc<Block>,
    fd: File,
}

impl Rig {
    fn with_block(kind: VmKind, config: &BlockConfig) -> Self {
        Self::with_kernel(Arc::new(FakeKernel::new(kind)), config)
    }

    fn with_kernel(kernel: Arc<FakeKernel>, config: &BlockConfig) -> Self {
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let block = Block::new(&vm, config).unwrap();
        Self {
            kernel,
            vm,
            block,
            fd,
        }
    }

    fn ordinary() -> Self {
        Self::with_block(VmKind::Ordinary, &BlockConfig::new("ram", SIZE))
    }

    fn confidential(dma_split: DmaSplit, initial: Attribute) -> Self {
        let config = BlockConfig {
            dma_split,
            release_delay: Duration::ZERO,
            ..BlockConfig::confidential("ram", SIZE, initial)
        };
        Self::with_block(VmKind::Confidential, &config)
    }

    /// With a memory slot, so that the kernel sees when a page is private and mapped.
    fn bind_all(&self) {
        let gpas = Span::new(Gpa(0), SIZE).unwrap();
        self.kernel.add_slot(gpas, self.block.file(Shared), 0);
        self.block.bind(0, SIZE, 0).unwrap().keep();
    }

    fn window(&self, offset: u64, length: u64) -> WindowConfig {
        self.window_in(0, offset, length)
    }

    fn window_in(&self, ioas_id: u32, offset: u64, length: u64) -> WindowConfig {
        WindowConfig {
            ioas_id,
            offset,
            length,
            iova: IOVA + offset,
            readonly: false,
        }
    }

    fn ioas(&self, id: u32) -> Ioas<'_> {
        let iommufd = self.fd.as_fd();
        Ioas { iommufd, id }
    }

    /// Somebody else has the first page of the IOVAs.
    fn take_first_iova(&self) {
        let page = Span::new(Offset(0), PAGE).unwrap();
        let file = self.block.file(Shared);
        let access = DeviceAccess::Read;
        self.kernel
            .dma_map_file(self.ioas(0), file, page, Iova(IOVA), access)
            .unwrap();
    }

    fn fail(&self, first: usize, count: usize, errno: i32) {
        self.kernel.fail(Some(Failures {
            first,
            count,
            errno,
        }));
    }

    /// The calls of a name that fail from now on: the numbers `which` picks of them, counted from 0.
    fn fail_calls(&self, name: &'static str, errno: i32, which: fn(usize) -> bool) {
        let count = AtomicUsize::new(0);
        self.kernel.fail_if(move |call| {
            let fails = call.contains(name) && which(count.fetch_add(1, Ordering::SeqCst));
            fails.then_some(errno)
        });
    }

    /// Pages that devices see in an IOAS.
    fn pages_seen(&self, ioas_id: u32) -> Vec<u64> {
        let file = self.block.file(Shared);
        let sees = |page: &u64| {
            let iova = IOVA + page * PAGE;
            self.kernel.device_sees(ioas_id, file, iova) == Some(page * PAGE)
        };
        (0..SIZE / PAGE).filter(sees).collect()
    }

    /// How many.
    fn seen(&self, ioas_id: u32) -> u64 {
        self.pages_seen(ioas_id).len() as u64
    }

    fn quarantined(&self) -> u64 {
        self.block.stats().bytes_quarantined / PAGE
    }

    /// A reshape fails, and so does the way back. What the window should show is quarantined then.
    fn fail_to_reshape(&self, from: u64, to: u64) -> gmem::Window {
        let window = self
            .block
            .add_window(&self.fd, &self.window(0, from))
            .unwrap();
        self.fail(1, usize::MAX, libc::ENOMEM);
        let smaller = self.window(0, to);
        let error = window.reshape(&smaller).unwrap_err();
        self.kernel.fail(None);
        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
        assert_eq!(window.span().size_bytes(), from, "it is to show");
        let stats = self.block.stats();
        assert_eq!(stats.bytes_dma_mapped, self.seen(0) * PAGE);
        assert_eq!(
            stats.bytes_dma_mapped + stats.bytes_quarantined,
            from,
            "devices reach {:#x}, and {:#x} are quarantined",
            stats.bytes_dma_mapped,
            stats.bytes_quarantined
        );
        window
    }

    fn all_is_shown(&self, bytes: u64) {
        let stats = self.block.stats();
        assert_eq!(
            (stats.bytes_dma_mapped, stats.bytes_quarantined),
            (bytes, 0)
        );
        assert_eq!(self.seen(0) * PAGE, bytes);
        assert_eq!(self.kernel.violations(), Vec::<String>::new());
    }
}

fn named(name: &str, dma_split: DmaSplit, initial: Attribute) -> BlockConfig {
    BlockConfig {
        dma_split,
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential(name, SIZE, initial)
    }
}

fn cut_config() -> BlockConfig {
    named("ram", DmaSplit::Cut, Shared)
}

#[test]
fn a_window_that_could_not_be_reshaped_shows_what_it_did_or_that_is_quarantined() {
    let unit = DmaSplit::Unit(4 * PAGE);
    let _ = Rig::ordinary().fail_to_reshape(SIZE, SIZE / 2);
    let _ = Rig::confidential(unit, Shared).fail_to_reshape(SIZE, 2 * PAGE);
    // One unit of four can't be mapped: the others are none of its business.
    let rig = Rig::confidential(unit, Shared);
    let window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    rig.fail(1, 5, libc::ENOMEM);
    let smaller = rig.window(0, SIZE - 2 * PAGE);
    window.reshape(&smaller).unwrap_err();
    rig.kernel.fail(None);
    let stats = rig.block.stats();
    assert_eq!(stats.bytes_dma_mapped + stats.bytes_quarantined, SIZE);
    assert!(stats.bytes_quarantined <= 4 * PAGE, "{stats:?}");
}

#[test]
fn what_a_failed_reshape_lost_comes_back_with_the_next_one() {
    let rig = Rig::ordinary();
    let window = rig.fail_to_reshape(SIZE, SIZE / 2);
    let same = rig.window(0, SIZE);
    window.reshape(&same).unwrap();
    rig.all_is_shown(SIZE);
    let rig = Rig::confidential(DmaSplit::Unit(4 * PAGE), Shared);
    let window = rig.fail_to_reshape(SIZE, 2 * PAGE);
    let smaller = rig.window(0, 6 * PAGE);
    window.reshape(&smaller).unwrap();
    rig.all_is_shown(6 * PAGE);
}

#[test]
fn what_a_failed_reshape_lost_comes_back_with_a_reset() {
    for rig in [
        Rig::ordinary(),
        Rig::confidential(DmaSplit::Unit(4 * PAGE), Shared),
    ] {
        let _window = rig.fail_to_reshape(SIZE, 2 * PAGE);
        rig.block.reset().unwrap();
        rig.all_is_shown(SIZE);
    }
}

/// An ordinary VM's pages are never to be kept from a device: one that has them keeps them.
#[test]
fn a_window_that_fails_takes_nothing_from_another() {
    let (rig, _windows) = one_window_lacks_all();
    assert_eq!(rig.block.stats().bytes_quarantined, SIZE);
}

/// An ordinary block with two windows: the first one lacks everything, the second has all, and the kernel
/// is well again.
fn one_window_lacks_all() -> (Rig, [gmem::Window; 2]) {
    let rig = Rig::ordinary();
    let other = rig
        .block
        .add_window(&rig.fd, &rig.window_in(1, 0, SIZE))
        .unwrap();
    let window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    rig.fail(1, usize::MAX, libc::ENOMEM);
    let smaller = rig.window(0, SIZE / 2);
    window.reshape(&smaller).unwrap_err();
    rig.kernel.fail(None);
    assert_eq!((rig.seen(0), rig.seen(1)), (0, SIZE / PAGE));
    (rig, [window, other])
}

#[test]
fn a_lost_page_takes_nothing_else_from_a_window_that_works() {
    let (rig, _windows) = one_window_lacks_all();
    // Whatever kept the first one from it goes on.
    rig.fail_calls("IOAS_MAP", libc::ENOMEM, |map| map == 0);
    rig.block.poison(3 * PAGE, PAGE).unwrap_err();
    rig.kernel.fail(None);
    assert_eq!((rig.seen(0), rig.seen(1)), (15, 12));
    let counted = rig.block.stats().quarantines;
    // And it is over.
    rig.block.poison(5 * PAGE, PAGE).unwrap();
    assert_eq!((rig.seen(0), rig.seen(1), rig.quarantined()), (14, 14, 0));
    assert_eq!(rig.block.stats().quarantines, counted);
}

#[test]
fn a_detach_that_fails_takes_nothing_from_a_window_that_works() {
    let (rig, _windows) = one_window_lacks_all();
    rig.fail_calls("mmap(MAP_FIXED)", libc::ENOMEM, |call| call == 0);
    rig.vm.detach().unwrap_err();
    rig.kernel.fail(None);
    assert_eq!((rig.seen(0), rig.seen(1), rig.quarantined()), (16, 16, 0));
}

#[test]
fn a_window_that_could_not_be_reshaped_keeps_what_is_quarantined_for_another() {
    let (rig, [_, other]) = one_window_lacks_all();
    rig.fail_calls("IOAS_MAP", libc::ENOMEM, |map| map == 0);
    let smaller = rig.window_in(1, 0, SIZE / 2);
    let error = other.reshape(&smaller).unwrap_err();
    rig.kernel.fail(None);
    assert_eq!((error.errno(), rig.seen(1)), (libc::ENOMEM, SIZE / PAGE));
}

#[test]
fn a_window_is_reshaped_while_its_pages_are_quarantined_for_another() {
    let (rig, [_, other]) = one_window_lacks_all();
    // The first one is still refused everything: its maps come second, when what is quarantined is tried.
    rig.fail_calls("IOAS_MAP", libc::ENOMEM, |map| map != 0);
    let smaller = rig.window_in(1, 0, SIZE / 2);
    other.reshape(&smaller).unwrap();
    rig.kernel.fail(None);
    assert_eq!((rig.seen(0), rig.seen(1)), (0, 8));
}

/// What no window can have keeps no other device away from the rest.
#[test]
fn a_new_window_of_an_ordinary_block_goes_without_what_is_quarantined() {
    let (rig, _windows) = one_window_lacks_all();
    rig.fail_calls("IOAS_MAP", libc::ENOMEM, |_| true);
    let third = rig.block.add_window(&rig.fd, &rig.window_in(2, 0, SIZE));
    rig.kernel.fail(None);
    let _third = third.unwrap();
    assert_eq!(rig.seen(2), 0);
    rig.block.reset().unwrap();
    assert_eq!((rig.seen(0), rig.seen(2), rig.quarantined()), (16, 16, 0));
}

#[test]
fn neighbours_that_a_quarantine_loses_are_quarantined_too() {
    let fake: Arc<OnceLock<Arc<FakeKernel>>> = Arc::default();
    let hooked = fake.clone();
    // Maps fail, and nothing else.
    let kernel = FakeKernel::with_hook(VmKind::Confidential, move |call| {
        if let Some(kernel) = hooked.get() {
            kernel.fail(call.contains("MAP_FILE").then_some(Failures {
                first: 0,
                count: 1,
                errno: libc::ENOMEM,
            }));
        }
    });
    let config = BlockConfig {
        dma_split: DmaSplit::Unit(4 * PAGE),
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", SIZE, Shared)
    };
    let rig = Rig::with_kernel(Arc::new(kernel), &config);
    let _large = rig
        .block
        .add_window(&rig.fd, &rig.window_in(1, 0, SIZE))
        .unwrap();
    let small = rig
        .block
        .add_window(&rig.fd, &rig.window(0, 2 * PAGE))
        .unwrap();
    let _ = fake.set(rig.kernel.clone());
    let smaller = rig.window(0, PAGE);
    small.reshape(&smaller).unwrap_err();
    // The large window has a whole unit in one area, which went with the two pages.
    let quarantined = rig.block.stats().bytes_quarantined / PAGE;
    assert_eq!((rig.seen(0), rig.seen(1), quarantined), (0, 12, 4));
}

#[test]
fn a_window_that_could_not_be_made_keeps_no_block_for_ever() {
    let rig = Rig::confidential(DmaSplit::Page, Shared);
    // The third map fails, and so do the unmaps after it.
    rig.fail_calls("IOAS_MAP", libc::ENOMEM, |map| map == 2);
    rig.kernel.refuse_unmaps(true);
    rig.block
        .add_window(&rig.fd, &rig.window(0, SIZE))
        .unwrap_err();
    // While something of it is left, the block is in use, and the sentence says by what.
    let error = rig.block.check_unused().unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY);
    assert!(error.to_string().contains("could not be closed"), "{error}");
    // The kernel is well again.
    rig.kernel.refuse_unmaps(false);
    rig.block.check_unused().unwrap();
    assert_eq!(rig.kernel.areas(0), 0);
    assert_eq!(rig.block.stats().windows, 0);
}

#[test]
fn a_window_that_could_not_be_made_is_in_no_other_ones_way() {
    let rig = Rig::confidential(DmaSplit::Page, Shared);
    rig.fail_calls("IOAS_MAP", libc::ENOMEM, |map| map == 2);
    rig.kernel.refuse_unmaps(true);
    rig.block
        .add_window(&rig.fd, &rig.window(0, SIZE))
        .unwrap_err();
    assert_eq!(rig.block.stats().windows, 1);
    rig.kernel.refuse_unmaps(false);
    rig.kernel.fail(None);
    let _window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    rig.all_is_shown(SIZE);
    assert_eq!(rig.block.stats().windows, 1);
}

/// Who made it has the handle, and ends it.
#[test]
fn a_window_that_refused_to_close_stays_its_owners() {
    let rig = Rig::confidential(DmaSplit::Page, Shared);
    let window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    rig.fail(0, usize::MAX, libc::EBUSY);
    window.remove().unwrap_err();
    rig.kernel.fail(None);
    assert_eq!(rig.block.check_unused().unwrap_err().errno(), libc::EBUSY);
    window.remove().unwrap();
    rig.block.check_unused().unwrap();
}

#[test]
fn a_window_ends_with_its_ioas() {
    let rig = Rig::ordinary();
    let window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    // Whoever made the IOAS has destroyed it: that has unmapped all.
    rig.fail(0, usize::MAX, libc::ENOENT);
    let closed = window.remove();
    rig.kernel.fail(None);
    closed.unwrap();
    rig.block.check_unused().unwrap();
}

/// Whoever destroys it first leaves the guest its conversions.
#[test]
fn conversions_go_on_where_an_ioas_is_gone() {
    for split in [DmaSplit::Cut, DmaSplit::Page, DmaSplit::Unit(4 * PAGE)] {
        for first in [Private, Shared] {
            let rig = Rig::confidential(split, Shared);
            for id in 0..2 {
                rig.kernel.ioas_disable_huge_pages(rig.ioas(id)).unwrap();
            }
            rig.block.bind(0, SIZE, 0).unwrap().keep();
            let window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
            let other = rig
                .block
                .add_window(&rig.fd, &rig.window_in(1, 0, SIZE))
                .unwrap();
            rig.vm.convert(PAGE, PAGE, Private).unwrap();
            rig.kernel.destroy_ioas(0);
            rig.vm.convert(PAGE, 2 * PAGE, first).unwrap();
            rig.vm
                .convert(
                    PAGE,
                    2 * PAGE,
                    if first == Private { Shared } else { Private },
                )
                .unwrap();
            rig.vm.convert(0, SIZE, Shared).unwrap();
            assert_eq!(rig.quarantined(), 0);
            assert_eq!((window.mapped(), rig.seen(1)), ((0, 0), SIZE / PAGE));
            window.remove().unwrap();
            other.remove().unwrap();
            assert_eq!(rig.block.stats().windows, 0);
            // Who asks for a window there hears of it.
            let error = rig
                .block
                .add_window(&rig.fd, &rig.window(0, SIZE))
                .unwrap_err();
            assert_eq!(error.errno(), libc::ENOENT, "{error}");
            assert_eq!(rig.block.stats().windows, 0);
        }
    }
}

#[test]
fn an_iova_that_is_taken_is_eexist_whatever_the_strategy() {
    for split in [DmaSplit::Cut, DmaSplit::default(), DmaSplit::Page] {
        let rig = Rig::confidential(split, Shared);
        rig.kernel.ioas_disable_huge_pages(rig.ioas(0)).unwrap();
        rig.take_first_iova();
        let error = rig
            .block
            .add_window(&rig.fd, &rig.window(0, SIZE))
            .unwrap_err();
        assert_eq!(error.errno(), libc::EEXIST, "{split:?}: {error}");
        assert_eq!(rig.kernel.areas(0), 1);
    }
}

#[test]
fn a_window_in_no_ioas_is_an_error_also_while_all_is_private() {
    for split in [
        DmaSplit::Cut,
        DmaSplit::default(),
        DmaSplit::Page,
        DmaSplit::Unit(4 * PAGE),
    ] {
        // ENOTTY: it is no iommufd.
        for errno in [libc::ENOENT, libc::ENOTTY] {
            let rig = Rig::confidential(split, Private);
            // Calls: F_DUPFD_CLOEXEC, and then it comes out.
            rig.fail(1, usize::MAX, errno);
            let made = rig.block.add_window(&rig.fd, &rig.window(0, SIZE));
            rig.kernel.fail(None);
            let result = made.map(drop).map_err(|error| error.errno());
            assert_eq!(result, Err(errno), "{split:?}");
            rig.block.check_unused().unwrap();
        }
    }
}

#[test]
fn a_kernel_that_cuts_nothing_is_no_error_unless_cuts_were_asked_for() {
    // Calls of the trial: F_DUPFD_CLOEXEC, IOMMU_OPTION, memfd_create, map, set, unmap a part.
    for call in [4, 5] {
        let made = |split| {
            let rig = Rig::confidential(split, Shared);
            rig.kernel.ioas_disable_huge_pages(rig.ioas(0)).unwrap();
            rig.fail(call, 1, libc::ENOTTY);
            let made = rig.block.add_window(&rig.fd, &rig.window(0, SIZE));
            rig.kernel.fail(None);
            made.map(|window| window.strategy())
                .map_err(|error| error.errno())
        };
        assert_eq!(made(DmaSplit::default()), Ok(StrategyKind::Page));
        assert_eq!(made(DmaSplit::Cut), Err(libc::ENOTSUP));
    }
}

/// What fails for a moment decides nothing for the life of a window.
#[test]
fn a_cut_that_fails_for_a_moment_is_tried_again() {
    for call in [4, 5] {
        for (errno, count, kind) in [
            (libc::ENOMEM, 1, StrategyKind::Cut),
            (libc::EBUSY, 2, StrategyKind::Cut),
            (libc::EPERM, 1, StrategyKind::Page),
        ] {
            let rig = Rig::confidential(DmaSplit::default(), Shared);
            rig.kernel.ioas_disable_huge_pages(rig.ioas(0)).unwrap();
            rig.fail(call, count, errno);
            let window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
            rig.kernel.fail(None);
            assert_eq!(window.strategy(), kind, "errno {errno} at call {call}");
            rig.all_is_shown(SIZE);
        }
    }
}

#[test]
fn cuts_of_one_iommufd_exclude_each_other_also_if_kcmp_stops_answering() {
    const PATIENCE: Duration = Duration::from_secs(2);
    let unmaps = Arc::new(AtomicUsize::new(0));
    let (first_unmaps, go) = mpsc::channel::<()>();
    let (second_unmaps, second_has_set) = mpsc::channel::<()>();
    let (first_is_done, done) = mpsc::channel::<()>();
    let armed = Arc::new(AtomicBool::new(false));
    let kernel = Arc::new(FakeKernel::with_hook(VmKind::Confidential, {
        let armed = armed.clone();
        let tells = Mutex::new((first_unmaps, second_unmaps));
        let (second_has_set, done) = (Mutex::new(second_has_set), Mutex::new(done));
        move |call| {
            if call != "VFIO_IOMMU_UNMAP_DMA" || !armed.load(Ordering::SeqCst) {
                return;
            }
            match unmaps.fetch_add(1, Ordering::SeqCst) {
                // The first cut has pointed the context at its IOAS, and is to unmap.
                0 => {
                    tells.lock().unwrap().0.send(()).unwrap();
                    let _ = second_has_set.lock().unwrap().recv_timeout(PATIENCE);
                }
                // The second has pointed it at another.
                1 => {
                    let _ = tells.lock().unwrap().1.send(());
                    let _ = done.lock().unwrap().recv_timeout(PATIENCE);
                }
                _ => {}
            }
        }
    }));
    let fd = File::open("/dev/null").unwrap();
    let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
    let config = BlockConfig {
        dma_split: DmaSplit::Cut,
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", SIZE, Shared)
    };
    let blocks: Vec<_> = [0, 1]
        .map(|number| {
            let iommufd = fd.as_fd();
            let id = number as u32;
            kernel
                .ioas_disable_huge_pages(Ioas { iommufd, id })
                .unwrap();
            let block = Block::new(&vm, &config).unwrap();
            let gpas = Span::new(Gpa(number * SIZE), SIZE).unwrap();
            kernel.add_slot(gpas, block.file(Shared), 0);
            block.bind(0, SIZE, number * SIZE).unwrap().keep();
            let window = WindowConfig {
                ioas_id: id,
                offset: 0,
                length: SIZE,
                iova: IOVA,
                readonly: false,
            };
            block.add_window(&fd, &window).unwrap().keep();
            // As a sandbox does that begins after the first device: it and the second one have the
            // same iommufd, and nobody says so.
            kernel.refuse_kcmp(true);
            block
        })
        .into();
    armed.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let vm = &vm;
        let second = scope.spawn(move || {
            go.recv().unwrap();
            vm.convert(SIZE + 4 * PAGE, PAGE, Private)
        });
        vm.convert(4 * PAGE, PAGE, Private).unwrap();
        first_is_done.send(()).unwrap();
        second.join().unwrap().unwrap();
    });
    for (id, block) in blocks.iter().enumerate() {
        let seen = kernel.device_sees(id as u32, block.file(Shared), IOVA + 4 * PAGE);
        assert_eq!(seen, None, "IOAS {id}");
    }
    assert_eq!(kernel.violations(), Vec::<String>::new());
}

/// An unmap that fails can leave a private page in a window. It never comes back with a neighbour.
#[test]
fn a_private_page_is_not_mapped_again_with_its_neighbour() {
    let rig = Rig::confidential(DmaSplit::Unit(4 * PAGE), Private);
    rig.block.bind(0, SIZE, 0).unwrap().keep();
    let _window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    rig.fail_calls("KVM_SET_MEMORY_ATTRIBUTES", libc::EBUSY, |_| true);
    rig.kernel.refuse_unmaps(true);
    rig.vm.convert(4 * PAGE, 2 * PAGE, Shared).unwrap_err();
    rig.kernel.refuse_unmaps(false);
    rig.kernel.fail(None);
    assert_eq!((rig.pages_seen(0), rig.quarantined()), (vec![4, 5], 2));
    // By way of the area that they are in.
    rig.vm.convert(5 * PAGE, PAGE, Shared).unwrap();
    assert_eq!((rig.pages_seen(0), rig.quarantined()), (vec![4, 5], 1));
    rig.vm.convert(5 * PAGE, PAGE, Private).unwrap();
    assert_eq!((rig.pages_seen(0), rig.quarantined()), (vec![], 0));
    assert!(!rig.kernel.has_memory(rig.block.file(Shared), 4 * PAGE));
}

/// Nor does what was unmapped come back with what may not be reached, should a neighbour fail.
#[test]
fn a_lost_page_is_not_mapped_again_with_its_neighbours() {
    let rig = Rig::confidential(DmaSplit::Unit(4 * PAGE), Shared);
    let _window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    // Page 0 alone can't be mapped at first.
    rig.fail_calls("IOAS_MAP", libc::ENOMEM, |map| map == 0);
    let result = rig.block.poison(PAGE, PAGE);
    rig.kernel.fail(None);
    result.unwrap_err();
    assert_eq!(rig.pages_seen(0)[..4], [0, 2, 3, 4]);
    assert_eq!(rig.quarantined(), 0);
    // As before: the unmap itself fails when all is gone.
    rig.fail_calls("IOAS_UNMAP", libc::EBUSY, |unmap| unmap == 0);
    rig.block.poison(5 * PAGE, PAGE).unwrap_err();
    rig.kernel.fail(None);
    assert_eq!(rig.pages_seen(0)[..7], [0, 2, 3, 4, 6, 7, 8]);
    assert_eq!(rig.quarantined(), 0);
}

#[test]
fn cuts_that_fail_leave_no_shared_page_unreachable_in_silence() {
    let rig = Rig::confidential(DmaSplit::Cut, Shared);
    rig.kernel.ioas_disable_huge_pages(rig.ioas(0)).unwrap();
    rig.block.bind(0, SIZE, 0).unwrap().keep();
    let _window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    rig.fail_calls("VFIO_IOMMU_UNMAP_DMA", libc::ENOMEM, |_| true);
    // The fake divides areas where cuts begin and end, and removes the first of several.
    rig.vm.convert(2 * PAGE, 3 * PAGE, Private).unwrap_err();
    rig.vm.convert(PAGE, 5 * PAGE, Private).unwrap_err();
    assert_eq!((rig.seen(0), rig.quarantined()), (16, 0));
    rig.vm.convert(3 * PAGE, 5 * PAGE, Private).unwrap_err();
    rig.kernel.fail(None);
    rig.vm.convert(0, SIZE, Shared).unwrap();
    rig.all_is_shown(SIZE);
    rig.vm.convert(0, SIZE, Private).unwrap();
    assert_eq!((rig.seen(0), rig.kernel.areas(0)), (0, 0));
}

#[test]
fn neighbours_that_an_unmap_loses_are_quarantined() {
    let rig = Rig::confidential(DmaSplit::Unit(4 * PAGE), Shared);
    rig.block.bind(0, SIZE, 0).unwrap().keep();
    let _window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    // The hardware has lost page 1, nobody has said so yet; an unmap fails half-way.
    rig.kernel.lose(rig.block.file(Shared), PAGE);
    rig.fail_calls("IOAS_UNMAP", libc::EBUSY, |unmap| unmap == 0);
    rig.vm.convert(0, PAGE, Private).unwrap_err();
    rig.kernel.fail(None);
    assert_eq!((rig.seen(0), rig.quarantined()), (13, 3));
}

/// As when nobody could tell at first, and who asks later wants another page.
#[test]
fn neighbours_that_turn_out_to_be_lost_come_back_or_are_quarantined() {
    for lost in [false, true] {
        for wanted in [Private, Shared] {
            let rig = Rig::confidential(DmaSplit::Unit(4 * PAGE), Shared);
            rig.block.bind(0, SIZE, 0).unwrap().keep();
            let _window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
            rig.vm.convert(3 * PAGE, PAGE, Private).unwrap();
            rig.kernel
                .fail_if(|call| call.contains("IOAS_").then_some(libc::EBUSY));
            rig.vm.convert(0, PAGE, Private).unwrap_err();
            rig.kernel.fail(None);
            // Doubtful: pages 0 to 2.
            assert_eq!((rig.seen(0), rig.quarantined()), (12, 3));
            if lost {
                rig.kernel.lose(rig.block.file(Shared), 2 * PAGE);
            }
            let page = match wanted {
                Private => 1,
                Shared => 0,
            };
            rig.vm.convert(page * PAGE, PAGE, wanted).unwrap();
            let check = || {
                let stats = rig.block.stats();
                assert_eq!(stats.bytes_dma_mapped, rig.seen(0) * PAGE);
                let reached = stats.bytes_dma_mapped + stats.bytes_quarantined;
                assert_eq!(reached, stats.bytes_shared, "{lost} {wanted:?} {stats:?}");
            };
            check();
            rig.vm.look_after(Duration::ZERO);
            rig.vm.look_after(Duration::from_secs(2));
            check();
            assert_eq!(rig.pages_seen(0).contains(&2), !lost);
        }
    }
}

thread_local! {
    static IS_LATE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// What is doubtful reaches beyond a request. Who asks about it, and is slow, says nothing of pages that
/// others convert meanwhile.
#[test]
fn who_settles_what_is_doubtful_strikes_out_no_page_of_others() {
    let (is_late, asked) = mpsc::channel::<()>();
    let (others_are_done, done) = mpsc::channel::<()>();
    let (is_late, done) = (Mutex::new(is_late), Mutex::new(done));
    let kernel = Arc::new(FakeKernel::with_hook(VmKind::Confidential, move |call| {
        // It is to find that the area is gone, and is slow.
        if call == "IOMMU_IOAS_COPY" && IS_LATE.get() {
            let _ = is_late.lock().unwrap().send(());
            let _ = done.lock().unwrap().recv();
        }
    }));
    let config = BlockConfig {
        dma_split: DmaSplit::Cut,
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", SIZE, Shared)
    };
    let rig = Rig::with_kernel(kernel, &config);
    rig.kernel.ioas_disable_huge_pages(rig.ioas(0)).unwrap();
    let gpas = Span::new(Gpa(0), SIZE).unwrap();
    rig.kernel.add_slot(gpas, rig.block.file(Shared), 0);
    rig.block.bind(0, SIZE, 0).unwrap().keep();
    let _window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    rig.kernel
        .fail_if(|call| call.contains("IOAS_").then_some(libc::ENOMEM));
    rig.vm.convert(0, SIZE, Private).unwrap_err();
    rig.kernel.fail(None);
    std::thread::scope(|scope| {
        let late = scope.spawn(|| {
            IS_LATE.set(true);
            let _ = rig.vm.convert(0, PAGE, Private);
        });
        asked.recv().unwrap();
        let page = |attribute| rig.vm.convert(4 * PAGE, PAGE, attribute).unwrap();
        page(Private);
        page(Shared);
        // Its hook is called once only.
        drop(others_are_done);
        let _ = late.join();
        page(Private);
    });
    assert_eq!(rig.kernel.violations(), Vec::<String>::new());
    assert_eq!(
        rig.kernel
            .device_sees(0, rig.block.file(Shared), IOVA + 4 * PAGE),
        None
    );
}

/// The way back of a window that could not be reshaped crosses its old end.
#[test]
fn the_way_back_of_a_reshape_leads_back() {
    let rig = Rig::ordinary();
    let window = rig
        .block
        .add_window(&rig.fd, &rig.window(PAGE, 7 * PAGE))
        .unwrap();
    rig.block.poison(12 * PAGE, PAGE).unwrap();
    rig.fail_calls("IOAS_MAP", libc::ENOMEM, |map| map == 1);
    let larger = rig.window(2 * PAGE, 13 * PAGE);
    let error = window.reshape(&larger).unwrap_err();
    rig.kernel.fail(None);
    assert_eq!(error.errno(), libc::ENOMEM, "{error}");
    assert_eq!(window.span(), Span::new(Offset(PAGE), 7 * PAGE).unwrap());
    assert_eq!(rig.pages_seen(0), (1..8).collect::<Vec<_>>());
    assert_eq!(rig.quarantined(), 0);
}

/// Somebody outside the library points the context at another IOAS of the same layout, where as many bytes go:
/// at the call of this name, and back at that one.
fn cut_elsewhere(answers_kcmp: bool, back_at: Option<&'static str>) {
    let fake: Arc<OnceLock<(Arc<FakeKernel>, File)>> = Arc::default();
    let hooked = fake.clone();
    let kernel = FakeKernel::with_hook(VmKind::Confidential, move |call| {
        let Some((kernel, fd)) = hooked.get() else {
            return;
        };
        let iommufd = fd.as_fd();
        if call == "VFIO_IOMMU_UNMAP_DMA" {
            kernel.vfio_ioas_set(Ioas { iommufd, id: 1 }).unwrap();
        } else if Some(call) == back_at {
            kernel.vfio_ioas_set(Ioas { iommufd, id: 0 }).unwrap();
        }
    });
    kernel.refuse_kcmp(!answers_kcmp);
    let rig = Rig::with_kernel(Arc::new(kernel), &cut_config());
    rig.bind_all();
    for id in 0..2 {
        rig.kernel.ioas_disable_huge_pages(rig.ioas(id)).unwrap();
    }
    let _window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    // A stranger's memory at the same addresses.
    let scratch = rig.kernel.create_memfd("stranger", SIZE).unwrap();
    let (all, access) = (Span::new(Offset(0), SIZE).unwrap(), DeviceAccess::Read);
    rig.kernel
        .dma_map_file(rig.ioas(1), scratch.as_fd(), all, Iova(IOVA), access)
        .unwrap();
    let _ = fake.set((rig.kernel.clone(), rig.fd.try_clone().unwrap()));
    rig.vm.convert(PAGE, PAGE, Private).unwrap_err();
    assert_eq!(rig.kernel.violations(), Vec::<String>::new());
    assert_eq!((rig.seen(0), rig.quarantined()), (SIZE / PAGE, 0));
}

#[test]
fn a_pointer_that_moves_under_a_cut_is_noticed() {
    for answers_kcmp in [false, true] {
        cut_elsewhere(answers_kcmp, None);
        cut_elsewhere(answers_kcmp, Some("IOMMU_IOAS_COPY"));
    }
}

/// Nobody says what it has done, and no page is private for that.
#[test]
fn a_cut_that_nobody_can_tell_of_has_failed() {
    for answers in [1, usize::MAX] {
        let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
        let rig = Rig::with_kernel(kernel, &cut_config());
        rig.bind_all();
        rig.kernel.ioas_disable_huge_pages(rig.ioas(0)).unwrap();
        let _window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
        let asked = AtomicUsize::new(0);
        rig.kernel.fail_if(move |call| {
            let fails = call == "IOMMU_IOAS_COPY" && asked.fetch_add(1, Ordering::SeqCst) < answers;
            fails.then_some(libc::ENOMEM)
        });
        let error = rig.vm.convert(PAGE, PAGE, Private).unwrap_err();
        rig.kernel.fail(None);
        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
        rig.vm.convert(PAGE, PAGE, Private).unwrap();
        assert_eq!((rig.seen(0), rig.quarantined()), (SIZE / PAGE - 1, 0));
        rig.vm.convert(PAGE, PAGE, Shared).unwrap();
        rig.all_is_shown(SIZE);
    }
}

/// Its kernel would not refuse it: nothing is mapped where pages are private.
#[test]
fn two_windows_have_no_address_of_an_ioas_in_common() {
    let rig = Rig::confidential(DmaSplit::Page, Private);
    let window = rig
        .block
        .add_window(&rig.fd, &rig.window(0, SIZE / 2))
        .unwrap();
    let more = BlockConfig::confidential("more", SIZE, Private);
    let other = Block::new(&rig.vm, &more).unwrap();
    for block in [&rig.block, &other] {
        let error = block
            .add_window(&rig.fd, &rig.window(7 * PAGE, 2 * PAGE))
            .unwrap_err();
        assert_eq!(error.errno(), libc::EEXIST, "{error}");
        let text = error.to_string();
        let named = text.contains("IOAS 0") && text.contains("DMA window's of ram");
        assert!(named && text.starts_with(block.name()), "{text}");
    }
    // Next to it, and in another IOAS.
    let next = other
        .add_window(&rig.fd, &rig.window(8 * PAGE, PAGE))
        .unwrap();
    let _elsewhere = other
        .add_window(&rig.fd, &rig.window_in(1, 0, SIZE))
        .unwrap();
    // What one gives up in a reshape, another gets, but not before.
    let larger = rig.window(7 * PAGE, 2 * PAGE);
    let error = next.reshape(&larger).unwrap_err();
    assert_eq!(error.errno(), libc::EEXIST, "{error}");
    assert_eq!(next.span().size_bytes(), PAGE);
    window.reshape(&rig.window(0, 7 * PAGE)).unwrap();
    next.reshape(&larger).unwrap();
    // One that has gone has none.
    window.remove().unwrap();
    let all = other.add_window(&rig.fd, &rig.window(0, 7 * PAGE)).unwrap();
    all.remove().unwrap();
    next.remove().unwrap();
    let _whole = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
}

/// Of a window that could not be closed others get what it has nothing of.
#[test]
fn what_is_left_of_a_window_is_nobody_elses() {
    let rig = Rig::confidential(DmaSplit::Page, Shared);
    rig.block.bind(0, SIZE, 0).unwrap().keep();
    let window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    rig.vm.convert(4 * PAGE, 4 * PAGE, Private).unwrap();
    rig.kernel.refuse_unmaps(true);
    window.remove().unwrap_err();
    let more = BlockConfig::confidential("more", SIZE, Private);
    let other = Block::new(&rig.vm, &more).unwrap();
    let error = other
        .add_window(&rig.fd, &rig.window(3 * PAGE, PAGE))
        .unwrap_err();
    assert_eq!(error.errno(), libc::EEXIST, "{error}");
    let _between = other
        .add_window(&rig.fd, &rig.window(4 * PAGE, 4 * PAGE))
        .unwrap();
    rig.kernel.refuse_unmaps(false);
    // By and by.
    rig.vm.convert(3 * PAGE, PAGE, Private).unwrap();
    let _more = other
        .add_window(&rig.fd, &rig.window(3 * PAGE, PAGE))
        .unwrap();
    window.remove().unwrap();
    let _rest = other
        .add_window(&rig.fd, &rig.window(8 * PAGE, 8 * PAGE))
        .unwrap();
}

/// Its number is another's, and so are its addresses.
#[test]
fn a_window_that_ended_with_its_ioas_has_no_addresses() {
    let rig = Rig::confidential(DmaSplit::Page, Shared);
    rig.block.bind(0, SIZE, 0).unwrap().keep();
    let window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    rig.kernel.destroy_ioas(0);
    let error = rig
        .block
        .add_window(&rig.fd, &rig.window(0, SIZE))
        .unwrap_err();
    assert_eq!(error.errno(), libc::ENOENT, "{error}");
    assert_eq!(rig.block.stats().windows_lost, 0);
    for _ in 0..2 {
        rig.vm.convert(PAGE, PAGE, Private).unwrap();
        rig.vm.convert(PAGE, PAGE, Shared).unwrap();
    }
    assert_eq!(rig.block.stats().windows_lost, 1);
    rig.kernel.make_ioas(0);
    let _next = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    window.remove().unwrap();
    assert_eq!(rig.seen(0), SIZE / PAGE);
    assert_eq!(rig.block.stats().windows_lost, 1);
}

/// To find out what is mapped takes no memory and shows none.
#[test]
fn who_finds_out_what_is_mapped_maps_nothing() {
    for split in [DmaSplit::Cut, DmaSplit::Page, DmaSplit::Unit(4 * PAGE)] {
        let rig = Rig::confidential(split, Shared);
        rig.kernel.ioas_disable_huge_pages(rig.ioas(0)).unwrap();
        rig.block.bind(0, SIZE, 0).unwrap().keep();
        let _window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
        let maps = Arc::new(AtomicUsize::new(0));
        let counted = maps.clone();
        rig.kernel.fail_if(move |call| {
            let is_map = call.contains("IOAS_MAP");
            counted.fetch_add(usize::from(is_map), Ordering::SeqCst);
            is_map.then_some(libc::ENOSPC)
        });
        rig.kernel.refuse_unmaps(true);
        rig.vm.convert(0, SIZE, Private).unwrap_err();
        rig.kernel.refuse_unmaps(false);
        // Nothing has gone: all of it is certain, by no map.
        assert_eq!(maps.load(Ordering::SeqCst), 0, "{split:?}");
        rig.vm.convert(0, SIZE, Private).unwrap();
        assert_eq!(maps.load(Ordering::SeqCst), 0, "{split:?}");
        assert_eq!((rig.seen(0), rig.quarantined()), (0, 0), "{split:?}");
    }
}

/// One whose first call took all that it was to take, and failed.
#[test]
fn a_window_closes_at_once_whatever_its_calls_say() {
    for split in [DmaSplit::Cut, DmaSplit::Page, DmaSplit::Unit(4 * PAGE)] {
        let rig = Rig::confidential(split, Shared);
        rig.kernel.ioas_disable_huge_pages(rig.ioas(0)).unwrap();
        let window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
        rig.fail_calls("IOAS_UNMAP", libc::EINTR, |_| true);
        window.remove().unwrap();
        rig.kernel.fail(None);
        assert_eq!(rig.kernel.areas(0), 0, "{split:?}");
        rig.block.check_unused().unwrap();
    }
}

/// Not even a window that maps nothing at first.
#[test]
fn nobody_gets_the_addresses_of_a_trial_that_is_still_there() {
    let rig = Rig::confidential(DmaSplit::default(), Private);
    rig.kernel.ioas_disable_huge_pages(rig.ioas(0)).unwrap();
    // It keeps the context, and has not been where cuts are tried.
    let _other = rig
        .block
        .add_window(&rig.fd, &rig.window_in(1, 0, PAGE))
        .unwrap();
    rig.kernel.refuse_unmaps(true);
    let error = rig
        .block
        .add_window(&rig.fd, &rig.window(0, SIZE))
        .unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY, "{error}");
    let more = BlockConfig {
        dma_split: DmaSplit::Page,
        ..BlockConfig::confidential("more", SIZE, Private)
    };
    let more = Block::new(&rig.vm, &more).unwrap();
    let error = more
        .add_window(&rig.fd, &rig.window(PAGE, PAGE))
        .unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY, "{error}");
    assert!(error.to_string().contains("no meaning"), "{error}");
    let _next = more
        .add_window(&rig.fd, &rig.window(2 * PAGE, PAGE))
        .unwrap();
    rig.kernel.refuse_unmaps(false);
    let _there = more.add_window(&rig.fd, &rig.window(PAGE, PAGE)).unwrap();
    assert_eq!(rig.kernel.areas(0), 0);
}

/// Whoever finds out that it has: here who gets back what was in one area with it.
#[test]
fn a_private_page_that_left_with_another_is_over_its_quarantine() {
    let rig = Rig::confidential(DmaSplit::Unit(4 * PAGE), Private);
    rig.block.bind(0, SIZE, 0).unwrap().keep();
    let _window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    rig.fail_calls("KVM_SET_MEMORY_ATTRIBUTES", libc::EBUSY, |_| true);
    rig.kernel.refuse_unmaps(true);
    rig.vm.convert(4 * PAGE, 2 * PAGE, Shared).unwrap_err();
    rig.kernel.refuse_unmaps(false);
    rig.kernel.fail(None);
    rig.vm.convert(5 * PAGE, PAGE, Shared).unwrap();
    // Page 4 is private, and devices have it: it is in one area with page 5.
    assert_eq!((rig.pages_seen(0), rig.quarantined()), (vec![4, 5], 1));
    rig.kernel
        .fail_if(|call| call.contains("IOAS_").then_some(libc::ENOMEM));
    rig.vm.convert(5 * PAGE, PAGE, Private).unwrap_err();
    rig.kernel.fail(None);
    // The area is gone, and nobody knows.
    assert_eq!((rig.pages_seen(0), rig.quarantined()), (vec![], 2));
    rig.vm.convert(5 * PAGE, PAGE, Shared).unwrap();
    assert_eq!((rig.pages_seen(0), rig.quarantined()), (vec![5], 0));
    assert!(!rig.kernel.has_memory(rig.block.file(Shared), 4 * PAGE));
}

/// A trial that leaves its pages, in an IOAS and a context that another window keeps.
fn left_by_a_trial(kernel: FakeKernel) -> (Rig, gmem::Window) {
    let config = named("ram", DmaSplit::default(), Private);
    let rig = Rig::with_kernel(Arc::new(kernel), &config);
    rig.kernel.ioas_disable_huge_pages(rig.ioas(0)).unwrap();
    let elsewhere = rig.window_in(1, 0, PAGE);
    let other = rig.block.add_window(&rig.fd, &elsewhere).unwrap();
    rig.kernel.refuse_unmaps(true);
    rig.block
        .add_window(&rig.fd, &rig.window(0, SIZE))
        .unwrap_err();
    rig.kernel.refuse_unmaps(false);
    assert_ne!(rig.kernel.areas(0), 0);
    (rig, other)
}

/// The next window there would show them, in its private pages.
#[test]
fn what_an_ended_block_has_left_is_cleared_before_its_addresses_are_given_away() {
    let rig = Rig::confidential(DmaSplit::Page, Private);
    // It keeps the context.
    let other = rig
        .block
        .add_window(&rig.fd, &rig.window_in(1, 0, PAGE))
        .unwrap();
    let leave = || {
        let gone = Block::new(&rig.vm, &named("gone", DmaSplit::Page, Shared)).unwrap();
        gone.add_window(&rig.fd, &rig.window(0, SIZE))
            .unwrap()
            .keep();
        rig.kernel.refuse_unmaps(true);
        drop(gone);
        assert_eq!(rig.kernel.areas(0), 16);
    };
    leave();
    let error = rig
        .block
        .add_window(&rig.fd, &rig.window(3 * PAGE, PAGE))
        .unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY, "{error}");
    rig.kernel.refuse_unmaps(false);
    // Some go, and then it fails: the next one takes the rest.
    rig.fail_calls("IOMMU_IOAS_UNMAP", libc::EINTR, |_| true);
    let _ = rig.block.add_window(&rig.fd, &rig.window(3 * PAGE, PAGE));
    rig.kernel.fail(None);
    let window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    assert_eq!(rig.kernel.areas(0), 0);
    window.remove().unwrap();
    // Nobody wants them: they go with the last window of the iommufd.
    leave();
    rig.kernel.refuse_unmaps(false);
    drop(other);
    assert_eq!(rig.kernel.areas(0), 0);
}

#[test]
fn what_is_left_is_cleared_by_one_only() {
    let (arrived, is_there) = mpsc::channel::<()>();
    let (go, may_go) = mpsc::channel::<()>();
    let (arrived, may_go) = (Mutex::new(arrived), Mutex::new(may_go));
    let kernel = FakeKernel::with_hook(VmKind::Confidential, move |call| {
        if call == "IOMMU_IOAS_UNMAP" && IS_LATE.get() {
            let _ = arrived.lock().unwrap().send(());
            let _ = may_go.lock().unwrap().recv();
        }
    });
    let (rig, _other) = left_by_a_trial(kernel);
    let late = Block::new(&rig.vm, &named("late", DmaSplit::Page, Shared)).unwrap();
    let quick = Block::new(&rig.vm, &named("quick", DmaSplit::Page, Shared)).unwrap();
    std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            IS_LATE.set(true);
            late.add_window(&rig.fd, &rig.window(0, PAGE))
        });
        is_there.recv().unwrap();
        let error = quick.add_window(&rig.fd, &rig.window(0, PAGE)).unwrap_err();
        assert_eq!(error.errno(), libc::EBUSY, "{error}");
        assert!(error.to_string().contains("try again"), "{error}");
        drop(go);
        let window = made.join().unwrap().unwrap();
        let seen = rig.kernel.device_sees(0, late.file(Shared), IOVA);
        assert_eq!((seen, window.mapped().0), (Some(0), PAGE));
    });
}

/// Its number is another's, who has something of his own there.
#[test]
fn what_is_left_is_cleared_in_no_other_ioas() {
    for ends in [true, false] {
        let (rig, other) = left_by_a_trial(FakeKernel::new(VmKind::Confidential));
        rig.kernel.destroy_ioas(0);
        rig.kernel.make_ioas(0);
        rig.take_first_iova();
        match ends {
            true => drop(other),
            // Nothing is shared, so nothing is in its way.
            false => {
                let page = named("page", DmaSplit::Page, Private);
                let page = Block::new(&rig.vm, &page).unwrap();
                let _window = page.add_window(&rig.fd, &rig.window(0, PAGE)).unwrap();
            }
        }
        assert_eq!(rig.kernel.areas(0), 1);
    }
}

/// Although what another has there by now looks just like it.
#[test]
fn what_was_left_in_an_ioas_that_is_seen_gone_is_forgotten() {
    let (rig, other) = left_by_a_trial(FakeKernel::new(VmKind::Confidential));
    rig.kernel.destroy_ioas(0);
    let error = rig
        .block
        .add_window(&rig.fd, &rig.window(8 * PAGE, PAGE))
        .unwrap_err();
    assert_eq!(error.errno(), libc::ENOENT, "{error}");
    rig.kernel.make_ioas(0);
    let scratch = rig.kernel.create_memfd("stranger", SIZE).unwrap();
    let (pages, access) = (Span::new(Offset(0), 2 * PAGE).unwrap(), DeviceAccess::Read);
    rig.kernel
        .dma_map_file(rig.ioas(0), scratch.as_fd(), pages, Iova(IOVA), access)
        .unwrap();
    drop(other);
    assert_eq!(rig.kernel.areas(0), 1);
}

#[test]
fn a_window_that_nobody_has_closes_by_itself() {
    let rig = Rig::confidential(DmaSplit::Page, Shared);
    let window = rig.block.add_window(&rig.fd, &rig.window(0, SIZE)).unwrap();
    rig.kernel.refuse_unmaps(true);
    drop(window);
    let more = Block::new(&rig.vm, &named("more", DmaSplit::Page, Shared)).unwrap();
    let error = more.add_window(&rig.fd, &rig.window(0, PAGE)).unwrap_err();
    assert_eq!(error.errno(), libc::EEXIST, "{error}");
    assert!(
        error.to_string().contains("tried again by itself"),
        "{error}"
    );
    rig.kernel.refuse_unmaps(false);
    let patience = Instant::now() + Duration::from_secs(60);
    while rig.block.stats().windows != 0 {
        assert!(Instant::now() < patience, "nobody closes it");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(rig.kernel.areas(0), 0);
    let _next = more.add_window(&rig.fd, &rig.window(0, PAGE)).unwrap();
}
