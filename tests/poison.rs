// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that the host's hardware has lost: nothing uses it, whatever fails, until it is replaced.

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::kernel::{Ioas, Kernel};
use gmem::{Attribute, Block, BlockConfig, Cause, DmaSplit, Gpa, Span, Vm, Window, WindowConfig};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const SIZE: u64 = 16 * PAGE;
const GPA: u64 = 1 << 20;
const IOVA: u64 = 1 << 32;

fn gpa_of(page: u64) -> u64 {
    match page < SIZE / PAGE / 2 {
        true => GPA + page * PAGE,
        false => GPA + SIZE / 2 + page * PAGE,
    }
}

/// A block, bound in two pieces with a hole between them, and shown in an IOAS.
struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    block: Arc<Block>,
    window: Option<Window>,
    fd: File,
}

impl Rig {
    fn new(kind: VmKind, dma_split: DmaSplit) -> Self {
        let kernel = Arc::new(FakeKernel::new(kind));
        let fd = File::open("/dev/null").unwrap();
        if dma_split == DmaSplit::Cut {
            let (iommufd, id) = (fd.as_fd(), 0);
            kernel
                .ioas_disable_huge_pages(Ioas { iommufd, id })
                .unwrap();
        }
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let config = match kind {
            VmKind::Ordinary => BlockConfig::new("ram", SIZE),
            _ => BlockConfig {
                dma_split,
                release_delay: Duration::ZERO,
                ..BlockConfig::confidential("ram", SIZE, Shared)
            },
        };
        let block = Block::new(&vm, &config).unwrap();
        let mut rig = Self {
            kernel,
            vm,
            block,
            window: None,
            fd,
        };
        rig.bind();
        rig.window = Some(rig.show().unwrap());
        rig
    }

    fn bind(&self) {
        for (offset, gpa) in [(0, GPA), (SIZE / 2, GPA + SIZE)] {
            let gpas = Span::new(Gpa(gpa), SIZE / 2).unwrap();
            let file = self.block.file(Shared);
            self.kernel.add_slot(gpas, file, offset);
            self.block.bind(offset, SIZE / 2, gpa).unwrap().keep();
        }
    }

    fn show(&self) -> gmem::Result<Window> {
        self.block.add_window(
            &self.fd,
            &WindowConfig {
                ioas_id: 0,
                offset: 0,
                length: SIZE,
                iova: IOVA,
                readonly: false,
            },
        )
    }

    /// The hardware loses a page, and QEMU hears of it.
    fn lose(&self, page: u64) -> gmem::Result<()> {
        let offset = page * PAGE;
        let (attribute, _) = self.block.run_at(offset).unwrap();
        self.kernel.lose(self.block.file(attribute), offset);
        self.vm.poison(gpa_of(page), PAGE)
    }

    fn fail(&self, first: usize, errno: i32) {
        let count = 1;
        self.kernel.fail(Some(Failures {
            first,
            count,
            errno,
        }));
    }

    fn device_sees(&self, page: u64) -> bool {
        let at = IOVA + page * PAGE;
        let file = self.block.file(Shared);
        self.kernel.device_sees(0, file, at).is_some()
    }

    /// Devices see what is shared, but for `lost`, and nobody has touched that.
    fn check(&self, lost: &[u64]) {
        assert_eq!(self.kernel.violations(), Vec::<String>::new());
        for page in 0..SIZE / PAGE {
            let offset = page * PAGE;
            let is_lost = lost.contains(&page);
            let shared = self.block.run_at(offset).unwrap().0 == Shared;
            assert_eq!(self.device_sees(page), shared && !is_lost, "page {page}");
            let access = self.block.check_access(offset, PAGE);
            match (is_lost, shared) {
                (false, _) => assert_eq!(access.is_ok(), shared, "page {page}"),
                (true, true) => assert_eq!(access.unwrap_err().errno(), libc::EIO),
                (true, false) => assert_eq!(access.unwrap_err().errno(), libc::EACCES),
            }
            let order = self.block.max_order(offset);
            match is_lost {
                true => assert_eq!(order.unwrap_err().errno(), libc::EIO),
                false => {
                    let size = PAGE << order.unwrap();
                    let first = offset & !(size - 1);
                    let mut pages = first / PAGE..(first + size) / PAGE;
                    assert!(!pages.any(|page| lost.contains(&page)), "page {page}");
                }
            }
        }
        let stats = self.block.stats();
        assert_eq!(stats.bytes_poisoned, lost.len() as u64 * PAGE);
        assert_eq!(stats.bytes_quarantined, 0);
    }
}

fn rigs() -> impl Iterator<Item = Rig> {
    let unit = DmaSplit::Unit(4 * PAGE);
    [
        (VmKind::Ordinary, DmaSplit::Page),
        (VmKind::Confidential, DmaSplit::Page),
        (VmKind::Confidential, DmaSplit::Cut),
        (VmKind::Confidential, unit),
        (VmKind::InPlace, DmaSplit::Page),
        (VmKind::InPlace, DmaSplit::Cut),
        (VmKind::InPlace, unit),
    ]
    .into_iter()
    .map(|(kind, split)| Rig::new(kind, split))
}

fn is_confidential(rig: &Rig) -> bool {
    let probe = rig.vm.probe();
    probe.private_attribute || probe.in_place_conversion
}

#[test]
fn a_lost_page_is_out_of_use_until_a_reset_replaces_it() {
    for rig in rigs() {
        rig.check(&[]);
        rig.lose(3).unwrap();
        rig.check(&[3]);
        rig.lose(5).unwrap();
        rig.lose(5).unwrap();
        rig.check(&[3, 5]);
        // Windows that come and go, and preallocation, leave it out.
        rig.window.as_ref().unwrap().remove().unwrap();
        let _window = rig.show().unwrap();
        rig.block.preallocate(2).unwrap();
        rig.check(&[3, 5]);
        for attribute in [Shared, Private] {
            let error = rig.vm.convert(GPA, SIZE / 2, attribute).unwrap_err();
            match is_confidential(&rig) {
                true => assert!(matches!(error.cause(), Cause::Poisoned { .. }), "{error}"),
                false => assert!(
                    error.errno() == libc::EIO || attribute == Private,
                    "{error}"
                ),
            }
        }
        rig.check(&[3, 5]);
        rig.block.reset().unwrap();
        rig.check(&[]);
        rig.vm.convert(GPA, SIZE / 2, Shared).unwrap();
    }
}

#[test]
fn neighbours_of_a_lost_page_convert_as_ever() {
    for rig in rigs().filter(is_confidential) {
        rig.lose(3).unwrap();
        for _ in 0..2 {
            rig.vm.convert(GPA, 3 * PAGE, Private).unwrap();
            rig.vm.convert(GPA + 4 * PAGE, 4 * PAGE, Private).unwrap();
            rig.check(&[3]);
            rig.vm.convert(GPA, 3 * PAGE, Shared).unwrap();
            rig.vm.convert(GPA + 4 * PAGE, 4 * PAGE, Shared).unwrap();
            rig.check(&[3]);
        }
    }
}

#[test]
fn a_private_page_can_be_lost_too() {
    for rig in rigs().filter(is_confidential) {
        rig.vm.convert(GPA, SIZE / 2, Private).unwrap();
        rig.lose(2).unwrap();
        rig.check(&[2]);
        let error = rig.vm.convert(GPA + 2 * PAGE, PAGE, Shared).unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
        // All pages are shared again afterwards, this one with fresh memory.
        rig.block.reset().unwrap();
        rig.check(&[]);
        assert_eq!(rig.block.run_at(0).unwrap(), (Shared, SIZE));
    }
}

#[test]
fn an_address_is_as_good_as_an_offset() {
    for rig in rigs() {
        // From the last page of the first piece, across the hole, to the first page of the second.
        let hole = SIZE / 2;
        let first = GPA + SIZE / 2 - 1;
        rig.vm.poison(first, hole + 2).unwrap();
        rig.check(&[7, 8]);
        for (gpa, size) in [(GPA + SIZE / 2, hole), (0, PAGE), (GPA, 0), (u64::MAX, 2)] {
            let error = rig.vm.poison(gpa, size).unwrap_err();
            assert!(matches!(error.cause(), Cause::Invalid), "{error}");
        }
        for (offset, size) in [(SIZE, 1), (0, SIZE + 1), (0, 0), (1, u64::MAX)] {
            let error = rig.block.poison(offset, size).unwrap_err();
            assert!(matches!(error.cause(), Cause::Invalid), "{error}");
        }
        rig.check(&[7, 8]);
    }
}

#[test]
fn a_new_vm_has_new_memory() {
    for rig in rigs() {
        rig.lose(3).unwrap();
        rig.vm.detach().unwrap();
        let error = rig.block.poison(0, PAGE).unwrap_err();
        assert!(matches!(error.cause(), Cause::Detached), "{error}");
        let error = rig.vm.poison(GPA, PAGE).unwrap_err();
        assert!(matches!(error.cause(), Cause::Detached), "{error}");
        rig.kernel.rebuild_vm();
        rig.vm.attach(&rig.fd).unwrap();
        rig.bind();
        rig.check(&[]);
    }
}

/// Whatever fails: what is lost counts as lost, and taking it out again is as good as the first time.
#[test]
fn a_failure_while_a_page_is_taken_out_leaves_it_lost() {
    for (number, sound) in rigs().enumerate() {
        sound.kernel.fail(None);
        sound.lose(3).unwrap();
        let calls = sound.kernel.calls().len();
        assert!(calls > 0);
        for (first, again) in (0..calls).flat_map(|first| [(first, true), (first, false)]) {
            let rig = rigs().nth(number).unwrap();
            rig.fail(first, libc::ENOMEM);
            let result = rig.lose(3);
            rig.kernel.fail(None);
            assert_eq!(rig.block.stats().bytes_poisoned, PAGE);
            assert_eq!(
                rig.block.check_access(3 * PAGE, 1).unwrap_err().errno(),
                libc::EIO
            );
            if result.is_ok() {
                assert!(!rig.device_sees(3), "call {first}");
            }
            // A reset takes it out as well, and out of a window that is mapped whole too.
            if again {
                rig.vm.poison(gpa_of(3), PAGE).unwrap();
                assert!(!rig.device_sees(3), "call {first}");
            }
            rig.block.reset().unwrap();
            // What could not be mapped again meanwhile is, too.
            rig.check(&[]);
        }
    }
}

/// Whatever fails: no device sees a page that is still lost, and the next reset replaces it.
#[test]
fn a_failure_while_a_page_is_replaced_can_be_made_good() {
    for (number, sound) in rigs().enumerate() {
        let lose = |rig: &Rig| {
            rig.lose(3).unwrap();
            rig.lose(9).unwrap();
            rig.kernel.fail(None);
        };
        lose(&sound);
        sound.block.reset().unwrap();
        for first in 0..sound.kernel.calls().len() {
            let rig = rigs().nth(number).unwrap();
            lose(&rig);
            rig.fail(first, libc::ENOMEM);
            let result = rig.block.reset();
            rig.kernel.fail(None);
            let stats = rig.block.stats();
            assert_eq!(result.is_err(), stats.bytes_poisoned > 0, "call {first}");
            for page in [3, 9] {
                let lost = rig.block.max_order(page * PAGE).is_err();
                assert!(!(lost && rig.device_sees(page)), "call {first}");
            }
            rig.block.reset().unwrap();
            assert_eq!(rig.block.stats().bytes_poisoned, 0);
            assert_eq!(rig.kernel.violations(), Vec::<String>::new());
        }
    }
}

/// A kernel that converts a lost page would touch it.
#[test]
fn a_reset_leaves_alone_what_is_still_lost() {
    for rig in rigs().filter(is_confidential) {
        rig.vm.convert(GPA, 5 * PAGE, Private).unwrap();
        rig.lose(1).unwrap();
        rig.lose(3).unwrap();
        // No fresh memory is to be had for the first one.
        rig.fail(0, libc::ENOMEM);
        let error = rig.block.reset().unwrap_err();
        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
        rig.kernel.fail(None);
        rig.check(&[1]);
        let run = (Private, 2 * PAGE);
        assert_eq!(rig.block.run_at(PAGE).unwrap(), run, "all others are reset");
        assert_eq!(rig.block.stats().bytes_private, PAGE);
        rig.block.reset().unwrap();
        rig.check(&[]);
        assert_eq!(rig.block.run_at(0).unwrap(), (Shared, SIZE));
    }
}

/// A block may end where no huge page does.
#[test]
fn a_page_lost_in_the_last_part_of_a_block_is_replaced() {
    const HUGE: u64 = 2 << 20;
    let size = HUGE + 4 * PAGE;
    for attribute in [Shared, Private] {
        let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
        kernel.set_transparent_huge_page(HUGE);
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let config = BlockConfig {
            dma_split: DmaSplit::Page,
            release_delay: Duration::ZERO,
            ..BlockConfig::confidential("ram", size, Shared)
        };
        let block = Block::new(&vm, &config).unwrap();
        block.bind(0, size, GPA).unwrap().keep();
        let window = WindowConfig {
            ioas_id: 0,
            offset: 0,
            length: size,
            iova: IOVA,
            readonly: false,
        };
        let _window = block.add_window(&fd, &window).unwrap();
        vm.convert(GPA + HUGE, 2 * PAGE, attribute).unwrap();
        vm.poison(GPA + HUGE + PAGE, PAGE).unwrap();
        block.reset().unwrap();
        let stats = block.stats();
        assert_eq!((stats.bytes_poisoned, stats.bytes_quarantined), (0, 0));
        assert_eq!(stats.bytes_dma_mapped, size);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Convert(u64, u64, Attribute),
    Lose(u64),
    Reset,
    ShowAnew,
}

fn op() -> impl Strategy<Value = Op> {
    let pages = SIZE / PAGE / 2;
    let attribute = prop_oneof![Just(Shared), Just(Private)];
    let range = (0..pages).prop_flat_map(move |first| (Just(first), 1..=pages - first));
    prop_oneof![
        6 => (range, attribute).prop_map(|((first, count), to)| Op::Convert(first, count, to)),
        2 => (0..2 * pages).prop_map(Op::Lose),
        1 => Just(Op::Reset),
        1 => Just(Op::ShowAnew),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_sequence_leaves_what_is_lost_alone(ops in prop::collection::vec(op(), 1..30)) {
        for mut rig in rigs() {
            let mut lost = BTreeSet::new();
            for op in &ops {
                match *op {
                    Op::Convert(first, count, attribute) => {
                        let touches = lost.range(first..first + count).next().is_some();
                        let result = rig.vm.convert(GPA + first * PAGE, count * PAGE, attribute);
                        match result {
                            Ok(()) => prop_assert!(!touches),
                            Err(_) if !is_confidential(&rig) => {}
                            Err(error) => {
                                prop_assert!(touches, "{}", error);
                                prop_assert_eq!(error.errno(), libc::EIO);
                            }
                        }
                    }
                    Op::Lose(page) => {
                        rig.lose(page).unwrap();
                        lost.insert(page);
                    }
                    Op::Reset => {
                        rig.block.reset().unwrap();
                        lost.clear();
                    }
                    Op::ShowAnew => {
                        let old = rig.window.take().unwrap();
                        old.remove().unwrap();
                        rig.window = Some(rig.show().unwrap());
                    }
                }
                rig.check(&lost.iter().copied().collect::<Vec<_>>());
            }
        }
    }
}

/// Pages are lost while others convert: nobody meets a lost one, and all are right after a reset.
#[test]
fn pages_may_be_lost_at_any_moment() {
    for rig in rigs().filter(is_confidential) {
        std::thread::scope(|scope| {
            for first in [0, 4] {
                let vm = &rig.vm;
                scope.spawn(move || {
                    for round in 0..200 {
                        let attribute = if round % 2 == 0 { Private } else { Shared };
                        let at = GPA + (first + round % 3) * PAGE;
                        if let Err(error) = vm.convert(at, 2 * PAGE, attribute) {
                            assert_eq!(error.errno(), libc::EIO, "{error}");
                        }
                    }
                });
            }
            for page in [1, 6, 12, 3] {
                std::thread::yield_now();
                rig.vm.poison(gpa_of(page), PAGE).unwrap();
                // Who asks for it from now on must not meet it; its attribute stays.
                let (attribute, _) = rig.block.run_at(page * PAGE).unwrap();
                rig.kernel.lose(rig.block.file(attribute), page * PAGE);
            }
        });
        let lost: Vec<u64> = (0..SIZE / PAGE)
            .filter(|page| rig.block.max_order(page * PAGE).is_err())
            .collect();
        assert_eq!(lost, [1, 3, 6, 12]);
        rig.check(&lost);
        rig.block.reset().unwrap();
        rig.check(&[]);
    }
}

/// A huge page of the shared plane is lost as a whole, and with it no private page: those have another file.
#[test]
fn a_lost_huge_page_takes_no_private_page_along() {
    const HUGE: u64 = 2 << 20;
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    kernel.set_pool(2);
    let fd = File::open("/dev/null").unwrap();
    let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
    let config = BlockConfig {
        hugetlb: Some(HUGE),
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", 2 * HUGE, Shared)
    };
    let block = Block::new(&vm, &config).unwrap();
    let gpas = Span::new(Gpa(GPA), 2 * HUGE).unwrap();
    kernel.add_slot(gpas, block.file(Shared), 0);
    block.bind(0, 2 * HUGE, GPA).unwrap().keep();
    let (private, shared) = (8 * PAGE, 9 * PAGE);
    vm.convert(GPA + private, PAGE, Private).unwrap();

    for offset in (0..HUGE).step_by(PAGE as usize) {
        kernel.lose(block.file(Shared), offset);
    }
    block.poison(0, HUGE).unwrap();
    assert_eq!(block.stats().bytes_poisoned, HUGE);
    // It is the guest's as ever, and so are its neighbours in no plane but the lost one.
    assert_eq!(block.max_order(private).unwrap(), 0);
    vm.convert(GPA + private, PAGE, Private).unwrap();
    block.preallocate(1).unwrap();
    let eio = |result: gmem::Result<()>| assert_eq!(result.unwrap_err().errno(), libc::EIO);
    eio(block.check_access(shared, PAGE));
    eio(block.max_order(shared).map(drop));
    // Neither way leads through what is lost.
    eio(vm.convert(GPA + private, PAGE, Shared));
    eio(vm.convert(GPA + shared, PAGE, Private));
    eio(vm.convert(GPA, 2 * HUGE, Shared));
    for attribute in [Private, Shared] {
        vm.convert(GPA + HUGE, HUGE, attribute).unwrap();
    }
    // What the guest loses of its private memory is another matter.
    vm.poison(GPA + private, PAGE).unwrap();
    assert_eq!(block.stats().bytes_poisoned, HUGE + PAGE);
    eio(block.max_order(private).map(drop));

    block.reset().unwrap();
    assert_eq!(block.stats().bytes_poisoned, 0);
    assert_eq!(block.run_at(0).unwrap(), (Shared, 2 * HUGE));
    block.check_access(0, 2 * HUGE).unwrap();
    assert_eq!(kernel.violations(), Vec::<String>::new());
}

/// A huge page that was promised is there again for all shared pages in it, not only for the lost one.
#[test]
fn a_promise_of_memory_outlives_a_loss() {
    const HUGE: u64 = 2 << 20;
    for initial in [Shared, Private] {
        for first in 0.. {
            let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
            kernel.set_pool(2);
            let fd = File::open("/dev/null").unwrap();
            let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
            let config = BlockConfig {
                hugetlb: Some(HUGE),
                reserve: true,
                release_delay: Duration::ZERO,
                ..BlockConfig::confidential("ram", 2 * HUGE, initial)
            };
            let block = Block::new(&vm, &config).unwrap();
            block.bind(0, 2 * HUGE, GPA).unwrap().keep();
            vm.convert(GPA, 2 * HUGE, Shared).unwrap();
            vm.convert(GPA, PAGE, Private).unwrap();
            // Behind the private page: nothing is left there to be allocated for itself.
            kernel.lose(block.file(Shared), 0);
            block.poison(0, PAGE).unwrap();
            let count = 1;
            let errno = libc::ENOMEM;
            kernel.fail(Some(Failures {
                first,
                count,
                errno,
            }));
            let result = block.reset();
            let calls = kernel.calls().len();
            let (attribute, _) = block.run_at(2 * PAGE).unwrap();
            let kept = kernel.has_memory(block.file(Shared), 2 * PAGE);
            let lost = block.stats().bytes_poisoned != 0;
            assert!(
                attribute == Private || kept || lost,
                "{initial:?}, call {first}: {result:?}"
            );
            if calls <= first {
                result.unwrap();
                break;
            }
        }
    }
}

/// A guest meets a lost page as often as it likes.
#[test]
fn what_is_known_to_be_lost_costs_no_calls() {
    for rig in rigs() {
        rig.lose(3).unwrap();
        rig.kernel.fail(None);
        rig.lose(3).unwrap();
        assert_eq!(rig.kernel.calls(), Vec::<&str>::new());
        rig.check(&[3]);
    }
}

/// What a device reads from it brings down the host.
#[test]
fn a_lost_page_that_devices_still_have_is_taken_from_them_in_time() {
    for rig in rigs() {
        rig.kernel.refuse_unmaps(true);
        rig.kernel
            .fail_if(|call| (call == "VFIO_IOMMU_UNMAP_DMA").then_some(libc::EBUSY));
        assert_eq!(rig.lose(3).unwrap_err().errno(), libc::EBUSY);
        let counted = rig.block.stats().quarantines;
        for seconds in [0, 2, 60, 120] {
            rig.vm.look_after(Duration::from_secs(seconds));
            assert!(rig.device_sees(3));
            let stats = rig.block.stats();
            let quarantined = (stats.bytes_quarantined, stats.quarantines);
            assert_eq!(quarantined, (PAGE, counted), "it is tried, and told once");
        }
        rig.kernel.refuse_unmaps(false);
        rig.kernel.fail(None);
        rig.vm.look_after(Duration::from_secs(300));
        rig.check(&[3]);
    }
}

/// A window of an ordinary block is mapped in pieces, and a lost page costs its own for a moment.
#[test]
fn a_lost_page_costs_devices_no_more_than_its_piece() {
    const PIECE: u64 = 1 << 30;
    let size = PIECE + SIZE;
    let kernel = Arc::new(FakeKernel::new(VmKind::Ordinary));
    let fd = File::open("/dev/null").unwrap();
    let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
    let block = Block::new(&vm, &BlockConfig::new("ram", size)).unwrap();
    let window = WindowConfig {
        ioas_id: 0,
        offset: 0,
        length: size,
        iova: IOVA,
        readonly: false,
    };
    let window = block.add_window(&fd, &window).unwrap();
    assert_eq!(block.stats().dma_areas, 2);
    let lost = PIECE + 3 * PAGE;
    kernel.lose(block.file(Shared), lost);
    kernel.fail_if(|call| call.contains("IOAS_MAP").then_some(libc::ENOMEM));
    let error = block.poison(lost, PAGE).unwrap_err();
    assert_eq!(error.errno(), libc::ENOMEM, "what could not be put back");
    let unmaps = |kernel: &FakeKernel| {
        let calls = kernel.calls().into_iter();
        calls.filter(|call| call.contains("UNMAP")).count()
    };
    assert_eq!(unmaps(&kernel), 1);
    let stats = block.stats();
    assert_eq!(
        (stats.bytes_dma_mapped, stats.bytes_quarantined),
        (PIECE, SIZE - PAGE)
    );
    // Twice is as good as once.
    block.poison(lost, PAGE).unwrap();
    assert_eq!(unmaps(&kernel), 1);
    kernel.fail(None);
    block.reset().unwrap();
    let stats = block.stats();
    assert_eq!((stats.bytes_dma_mapped, stats.bytes_quarantined), (size, 0));
    assert_eq!(kernel.violations(), Vec::<String>::new());
    // Nor does a part that the window shows no longer cost more.
    kernel.fail(None);
    let smaller = WindowConfig {
        ioas_id: 0,
        offset: 0,
        length: size - PAGE,
        iova: IOVA,
        readonly: false,
    };
    window.reshape(&smaller).unwrap();
    assert_eq!(kernel.calls().len(), 2, "{:?}", kernel.calls());
    assert_eq!(block.stats().bytes_dma_mapped, size - PAGE);
}
