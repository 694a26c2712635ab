// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a VMM places into a guest's memory before it starts, on a kernel that fails any call.

use gmem::kernel::fake::{Contested, Failures, FakeKernel, VmKind};
use gmem::{Attribute, Block, BlockConfig, Cause, DmaSplit, Listener, Vm, Window, WindowConfig};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const HUGE: u64 = 2 << 20;
const SIZE: u64 = 2 * HUGE;
/// Not a page's beginning, nor an end of one.
const AT: u64 = HUGE - 100;
const IMAGE: [u8; 9000] = [0xf1; 9000];
/// The pages that the image has a part in.
const PAGES: std::ops::Range<u64> = HUGE - PAGE..HUGE + 3 * PAGE;

struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    block: Arc<Block>,
    window: Option<Window>,
    fd: File,
}

impl Rig {
    fn new(kind: VmKind, initial: Attribute, hugetlb: Option<u64>) -> Self {
        let kernel = Arc::new(FakeKernel::new(kind));
        kernel.set_pool((SIZE / HUGE) as usize);
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let config = match kind {
            VmKind::Ordinary => BlockConfig::new("ram", SIZE),
            _ => BlockConfig {
                dma_split: DmaSplit::Unit(HUGE),
                hugetlb,
                release_delay: Duration::ZERO,
                ..BlockConfig::confidential("ram", SIZE, initial)
            },
        };
        let block = Block::new(&vm, &config).unwrap();
        block.bind(0, SIZE, 0).unwrap().keep();
        let mut rig = Self {
            kernel,
            vm,
            block,
            window: None,
            fd,
        };
        let window = rig.block.add_window(
            &rig.fd,
            &WindowConfig {
                ioas_id: 0,
                offset: 0,
                length: SIZE,
                iova: 0,
                readonly: false,
            },
        );
        rig.window = Some(window.unwrap());
        rig
    }

    fn fail(&self, first: usize, errno: i32) {
        let count = 1;
        self.kernel.fail(Some(Failures {
            first,
            count,
            errno,
        }));
    }

    /// The block's bytes, by its mapping: the fake kernel closes no page to the VMM.
    fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let host = self.block.host();
        // SAFETY: in the block's mapping, which nobody else uses.
        unsafe {
            std::ptr::copy_nonoverlapping(host.add(offset as usize), bytes.as_mut_ptr(), length);
        }
        bytes
    }

    fn is_there(&self) -> bool {
        let around = self.bytes(AT - 1, IMAGE.len() + 2);
        assert_eq!((around[0], around[IMAGE.len() + 1]), (0, 0));
        around[1..=IMAGE.len()] == IMAGE
    }

    /// Pages of the image that the kernel has for shared.
    fn shared_pages(&self) -> usize {
        let file = self.block.file(Private);
        PAGES
            .step_by(PAGE as usize)
            .filter(|&offset| !self.kernel.is_private_in(file, offset))
            .count()
    }
}

fn in_place(initial: Attribute) -> impl Iterator<Item = Rig> {
    [None, Some(HUGE)]
        .into_iter()
        .map(move |hugetlb| Rig::new(VmKind::InPlace, initial, hugetlb))
}

struct Nothing;

impl Listener for Nothing {
    fn begin(&self, change: &gmem::Change) -> Result<(), i32> {
        panic!("nobody is to hear of {change:?}");
    }

    fn end(&self, _: &gmem::Change, _: bool) {}
}

#[test]
fn shared_memory_takes_an_image() {
    for kind in [VmKind::Ordinary, VmKind::Confidential, VmKind::InPlace] {
        let rig = Rig::new(kind, Shared, None);
        rig.block.place(AT, &IMAGE).unwrap();
        assert!(rig.is_there());
        rig.block.place(SIZE - 1, &[7]).unwrap();
        assert_eq!(rig.bytes(SIZE - 1, 1), [7]);
        for (offset, length) in [(SIZE, 1), (SIZE - 1, 2), (0, 0), (u64::MAX, 2)] {
            let error = rig.block.place(offset, &IMAGE[..length]).unwrap_err();
            assert!(matches!(error.cause(), Cause::Invalid), "{error}");
        }
    }
}

#[test]
fn private_memory_takes_an_image_and_is_private_again() {
    for rig in in_place(Private) {
        let before = rig.kernel.snapshot();
        let listener = rig.block.add_listener(Arc::new(Nothing));
        rig.block.place(AT, &IMAGE).unwrap();
        assert!(rig.is_there());
        assert_eq!((before.0, before.2), {
            let after = rig.kernel.snapshot();
            (after.0, after.2)
        });
        assert_eq!(rig.shared_pages(), 0);
        let stats = rig.block.stats();
        assert_eq!(stats.bytes_private, SIZE);
        assert_eq!(
            (stats.to_private, stats.to_shared),
            (0, 0),
            "no guest asked"
        );
        assert_eq!(stats.map_file_calls + stats.map_address_calls, 0);
        assert_eq!(rig.kernel.violations(), Vec::<String>::new());
        drop(listener);
    }
}

#[test]
fn only_private_pages_change_for_it() {
    for rig in in_place(Private) {
        rig.vm.convert(HUGE, PAGE, Shared).unwrap();
        rig.block.place(AT, &IMAGE).unwrap();
        assert!(rig.is_there());
        assert_eq!(rig.shared_pages(), 1);
        assert_eq!(rig.block.run_at(HUGE).unwrap(), (Shared, HUGE + PAGE));
        assert_eq!(rig.block.stats().bytes_dma_mapped, PAGE);
    }
}

#[test]
fn a_split_blocks_private_pages_are_out_of_reach() {
    let rig = Rig::new(VmKind::Confidential, Private, None);
    let error = rig.block.place(AT, &IMAGE).unwrap_err();
    assert!(matches!(error.cause(), Cause::Unsupported), "{error}");
    assert!(!rig.is_there());
    rig.vm.convert(HUGE, HUGE, Shared).unwrap();
    let error = rig.block.place(AT, &IMAGE).unwrap_err();
    assert!(matches!(error.cause(), Cause::Unsupported), "{error}");
    rig.vm.convert(0, HUGE, Shared).unwrap();
    rig.block.place(AT, &IMAGE).unwrap();
    assert!(rig.is_there());
}

#[test]
fn an_image_that_fails_leaves_every_page_as_it_was_or_quarantined() {
    for hugetlb in [None, Some(HUGE)] {
        let new = || {
            let rig = Rig::new(VmKind::InPlace, Private, hugetlb);
            // Two runs of private pages.
            rig.vm.convert(HUGE, PAGE, Shared).unwrap();
            rig.kernel.fail(None);
            rig
        };
        let sound = new();
        sound.block.place(AT, &IMAGE).unwrap();
        for first in 0..sound.kernel.calls().len() {
            let rig = new();
            rig.fail(first, libc::ENOMEM);
            rig.block.place(AT, &IMAGE).unwrap_err();
            rig.kernel.fail(None);
            let stats = rig.block.stats();
            let open = rig.shared_pages() as u64 - 1;
            assert_eq!(stats.bytes_shared, PAGE + open * PAGE, "call {first}");
            assert_eq!(stats.bytes_quarantined, open * PAGE, "call {first}");
            assert_eq!(stats.bytes_dma_mapped, PAGE);
            assert!(open == 0 || rig.is_there(), "only on the way back");
            // The guest gets it right.
            rig.vm.convert(0, SIZE, Private).unwrap();
            assert_eq!(rig.shared_pages(), 0);
            assert_eq!(rig.block.stats().bytes_quarantined, 0);
            assert_eq!(rig.kernel.violations(), Vec::<String>::new());
        }
    }
}

#[test]
fn a_page_that_somebody_holds_can_not_become_private_again() {
    for rig in in_place(Private) {
        let file = rig.block.file(Private);
        rig.kernel.hold(file, HUGE, usize::MAX);
        let error = rig.block.place(AT, &IMAGE).unwrap_err();
        assert_eq!(error.errno(), libc::EAGAIN);
        let text = error.to_string();
        assert!(text.contains("offset 0x200000"), "{text}");
        assert!(text.contains("no holder found in this process"), "{text}");
        assert!(rig.block.stats().bytes_quarantined > 0);
        rig.kernel.let_go();
        rig.vm.convert(0, SIZE, Private).unwrap();
        assert_eq!(rig.shared_pages(), 0);
        // For a moment only: nothing comes of it.
        rig.kernel.hold(rig.block.file(Private), HUGE, 2);
        rig.block.place(AT, &IMAGE).unwrap();
        assert_eq!(rig.block.stats().bytes_quarantined, 0);
    }
}

#[test]
fn memory_out_of_the_direct_map_takes_an_image_and_no_device() {
    for kind in [VmKind::Ordinary, VmKind::InPlace] {
        let kernel = Arc::new(FakeKernel::new(kind));
        kernel.set_contested(Contested::NoDirectMap);
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let confidential = matches!(kind, VmKind::InPlace);
        let config = BlockConfig {
            direct_map: false,
            confidential,
            ..BlockConfig::new("ram", SIZE)
        };
        let block = Block::new(&vm, &config).unwrap();
        block.bind(0, SIZE, 0).unwrap().keep();
        block.place(AT, &IMAGE).unwrap();
        kernel.fail(None);
        block.preallocate(1).unwrap();
        // In batches, and never by a populating call, which pins.
        assert_eq!(kernel.calls(), ["fallocate"]);
        let window = block.add_window(
            &fd,
            &WindowConfig {
                ioas_id: 0,
                offset: 0,
                length: SIZE,
                iova: 0,
                readonly: false,
            },
        );
        let error = window.unwrap_err();
        assert!(matches!(error.cause(), Cause::Unsupported), "{error}");
        assert!(error.to_string().contains("direct-map"), "{error}");
        vm.detach().unwrap();
        vm.attach(&fd).unwrap();
        assert!(kernel.is_out_of_direct_map(block.file(Shared)));
        if confidential {
            vm.convert(0, PAGE, Private).unwrap_err();
            block.bind(0, SIZE, 0).unwrap().keep();
            vm.convert(0, PAGE, Private).unwrap();
        }
    }
}

#[test]
fn direct_map_off_is_refused_where_it_can_not_be() {
    let refused = |kind, contested, config: BlockConfig| {
        let kernel = Arc::new(FakeKernel::new(kind));
        kernel.set_contested(contested);
        kernel.set_pool(2);
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let config = BlockConfig {
            direct_map: false,
            ..config
        };
        let error = Block::new(&vm, &config).unwrap_err();
        assert!(matches!(error.cause(), Cause::Unsupported), "{error}");
        error.to_string()
    };
    let plain = || BlockConfig::new("ram", SIZE);
    let confidential = || BlockConfig::confidential("ram", SIZE, Shared);
    for meaning in [
        Contested::Nothing,
        Contested::HugePages,
        Contested::Write,
        Contested::Other,
    ] {
        for (kind, config) in [
            (VmKind::Ordinary, plain()),
            (VmKind::InPlace, confidential()),
        ] {
            let text = refused(kind, meaning, config);
            assert!(
                text.contains("no kernel that was released has it"),
                "{text}"
            );
        }
    }
    let huge = BlockConfig {
        hugetlb: Some(HUGE),
        ..confidential()
    };
    let text = refused(VmKind::InPlace, Contested::NoDirectMap, huge);
    assert!(text.contains("exclude each other"), "{text}");
}
