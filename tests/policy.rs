// SPDX-License-Identifier: MIT OR Apache-2.0
//! NUMA policies hold for every page of both planes, however it comes to have memory, on a kernel that
//! fails any call.

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::{
    Attribute, Block, BlockConfig, DmaSplit, NumaPolicy, PolicyMode, Vm, Window, WindowConfig,
};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const HUGE: u64 = 2 << 20;
const SIZE: u64 = 2 * HUGE;

struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    fd: File,
}

impl Rig {
    fn new(kind: VmKind) -> Self {
        let kernel = Arc::new(FakeKernel::new(kind));
        kernel.set_pool((SIZE / HUGE) as usize);
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        Self { kernel, vm, fd }
    }

    fn block(&self, config: BlockConfig) -> gmem::Result<Arc<Block>> {
        let block = Block::new(
            &self.vm,
            &BlockConfig {
                policy: NumaPolicy::new(PolicyMode::Bind, &[1]),
                dma_split: DmaSplit::Unit(HUGE),
                ..config
            },
        )?;
        block.bind(0, SIZE, 0)?.keep();
        Ok(block)
    }

    fn window(&self, block: &Arc<Block>) -> Window {
        let config = WindowConfig {
            ioas_id: 0,
            offset: 0,
            length: SIZE,
            iova: 0,
            readonly: false,
        };
        block.add_window(&self.fd, &config).unwrap()
    }

    /// Pages with memory in the plane of `attribute`.
    fn pages(&self, block: &Block, attribute: Attribute) -> u64 {
        let file = block.file(attribute);
        (0..SIZE / PAGE)
            .filter(|page| self.kernel.has_memory(file, page * PAGE))
            .count() as u64
    }

    fn check(&self, block: &Block) {
        for attribute in [Shared, Private] {
            let stray = self.kernel.stray_pages(block.file(attribute));
            assert_eq!(stray, 0, "{attribute:?}");
        }
    }
}

fn confidential(initial: Attribute, hugetlb: Option<u64>) -> BlockConfig {
    BlockConfig {
        hugetlb,
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", SIZE, initial)
    }
}

#[test]
fn memory_comes_by_the_policy_however_it_comes() {
    for hugetlb in [None, Some(HUGE)] {
        for initial in [Shared, Private] {
            for reserve in [true, false] {
                let rig = Rig::new(VmKind::Confidential);
                let config = BlockConfig {
                    reserve,
                    ..confidential(initial, hugetlb)
                };
                let block = rig.block(config).unwrap();
                let at_first = rig.pages(&block, initial);
                let expected = match (initial, hugetlb) {
                    (Shared, None) => 0,
                    _ => SIZE / PAGE,
                };
                assert_eq!(at_first, expected, "{initial:?} {hugetlb:?}");
                let _window = rig.window(&block);
                for attribute in [Private, Shared, Private] {
                    rig.vm.convert(PAGE, HUGE, attribute).unwrap();
                    rig.check(&block);
                    let there = rig.pages(&block, attribute);
                    assert!(there >= HUGE / PAGE, "{attribute:?}: {there}");
                }
                block.preallocate(2).unwrap();
                rig.check(&block);
                block.reset().unwrap();
                rig.check(&block);
                if initial == Private {
                    assert_eq!(rig.pages(&block, Private), SIZE / PAGE);
                }
                assert_eq!(block.stats().release_failures, 0);
            }
        }
    }
}

#[test]
fn an_ordinary_vms_memory_is_placed_when_its_block_is_made() {
    let rig = Rig::new(VmKind::Ordinary);
    let block = rig.block(BlockConfig::new("ram", SIZE)).unwrap();
    assert_eq!(rig.pages(&block, Shared), SIZE / PAGE);
    rig.check(&block);
}

#[test]
fn a_rebuilt_vms_memory_goes_by_the_policy_too() {
    for (kind, config) in [
        (VmKind::Ordinary, BlockConfig::new("ram", SIZE)),
        (VmKind::Confidential, confidential(Private, None)),
        (VmKind::Confidential, confidential(Shared, Some(HUGE))),
    ] {
        let rig = Rig::new(kind);
        let initial = config.initial;
        let block = rig.block(config).unwrap();
        rig.kernel.rebuild_vm();
        rig.vm.detach().unwrap();
        assert_eq!(rig.pages(&block, initial), 0);
        rig.vm.attach(&rig.fd).unwrap();
        assert_eq!(rig.pages(&block, initial), SIZE / PAGE);
        rig.check(&block);
    }
}

/// In place it gives private memory back, and new memory comes as a new block's does.
#[test]
fn what_a_reset_has_emptied_is_filled_by_the_policy() {
    for hugetlb in [None, Some(HUGE)] {
        let rig = Rig::new(VmKind::InPlace);
        let block = rig.block(confidential(Shared, hugetlb)).unwrap();
        let _window = rig.window(&block);
        rig.vm.convert(PAGE, 2 * PAGE, Private).unwrap();
        block.reset().unwrap();
        assert_eq!(rig.pages(&block, Shared), SIZE / PAGE);
        assert_eq!(rig.kernel.stray_pages(block.file(Shared)), 0);
    }
}

#[test]
fn private_memory_that_can_not_be_had_is_an_error_before_anything_changes() {
    for first in 0.. {
        let rig = Rig::new(VmKind::Confidential);
        let block = rig.block(confidential(Shared, None)).unwrap();
        let _window = rig.window(&block);
        rig.vm.convert(3 * PAGE, PAGE, Private).unwrap();
        let snapshot = rig.kernel.snapshot();
        rig.kernel.fail(Some(Failures {
            first,
            count: 1,
            errno: libc::ENOMEM,
        }));
        let result = rig.vm.convert(PAGE, 4 * PAGE, Private);
        let calls = rig.kernel.calls();
        rig.kernel.fail(None);
        let Err(error) = result else {
            // Two runs; only releasing what is shared no more may fail without a word.
            assert!(first >= 5, "{calls:?}");
            break;
        };
        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
        assert_eq!(rig.kernel.snapshot(), snapshot, "call {first} of {calls:?}");
        assert_eq!(block.run_at(PAGE).unwrap().0, Shared);
        rig.vm.convert(PAGE, 4 * PAGE, Private).unwrap();
        rig.check(&block);
    }
}

#[test]
fn a_block_whose_policy_fails_is_none() {
    for (kind, config) in [
        (VmKind::Ordinary, BlockConfig::new("ram", SIZE)),
        (VmKind::Confidential, confidential(Private, Some(HUGE))),
    ] {
        for first in 0.. {
            let rig = Rig::new(kind);
            rig.kernel.fail(Some(Failures {
                first,
                count: 1,
                errno: libc::EINVAL,
            }));
            let result = rig.block(config.clone());
            rig.kernel.fail(None);
            match result {
                Ok(_) if first > 5 => break,
                Ok(_) => panic!("call {first} could not fail"),
                Err(error) => assert_eq!(error.errno(), libc::EINVAL, "{error}"),
            }
        }
    }
}

/// Threads of this process that allocate.
fn allocators() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
    tasks
        .filter_map(|task| name(task.unwrap()))
        .filter(|name| name.trim() == "gmem-allocator")
        .count()
}

#[test]
fn the_thread_that_allocates_ends_with_its_block() {
    // Other tests of this program run beside this one and have such threads too.
    let came_and_went = (0..100).any(|_| {
        let rig = Rig::new(VmKind::Confidential);
        let before = allocators();
        let block = rig.block(confidential(Private, None)).unwrap();
        let with = allocators();
        drop(block);
        with == before + 1 && allocators() == before
    });
    assert!(came_and_went);
}
