// SPDX-License-Identifier: MIT OR Apache-2.0
//! DMA windows whose kernel fails: what devices reach is what the books say, nothing is kept for ever,
//! and an errno says what was wrong.

use gmem::kernel::fake::{FakeKernel, VmKind};
use gmem::kernel::{Ioas, Kernel};
use gmem::{Attribute, Block, BlockConfig, DmaSplit, Gpa, Span, Vm, WindowConfig};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const SIZE: u64 = 16 * PAGE;
const IOVA: u64 = 1 << 32;

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
    let vm = Vm::with_kernel(kernel.clone(), fd.as_raw_fd()).unwrap();
    let config = BlockConfig {
        dma_split: DmaSplit::Cut,
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
            block.bind(0, SIZE, number * SIZE).unwrap();
            let window = WindowConfig {
                iommufd: fd.as_raw_fd(),
                ioas_id: id,
                offset: 0,
                length: SIZE,
                iova: IOVA,
                readonly: false,
            };
            block.add_window(&window).unwrap();
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
