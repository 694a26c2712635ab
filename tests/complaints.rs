// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest makes us say again and again holds back nothing that matters more.

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::{Attribute, Block, BlockConfig, DmaSplit, Vm, WindowConfig};
use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;

/// Errors, as they were logged.
static ERRORS: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Listens;

impl log::Log for Listens {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        metadata.level() == log::Level::Error
    }
    fn log(&self, record: &log::Record) {
        ERRORS.lock().unwrap().push(record.args().to_string());
    }
    fn flush(&self) {}
}

fn logged(text: &str) -> usize {
    let errors = ERRORS.lock().unwrap();
    errors.iter().filter(|error| error.contains(text)).count()
}

#[test]
fn a_quarantine_is_told_however_much_else_there_is_to_complain_of() {
    log::set_logger(&Listens).unwrap();
    log::set_max_level(log::LevelFilter::Error);
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let fd = File::open("/dev/null").unwrap();
    let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
    let config = BlockConfig {
        dma_split: DmaSplit::Page,
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", 16 * PAGE, Shared)
    };
    let block = Block::new(&vm, &config).unwrap();
    block.bind(0, 16 * PAGE, 0).unwrap().keep();
    let window = WindowConfig {
        ioas_id: 0,
        offset: 0,
        length: PAGE,
        iova: 1 << 32,
        readonly: false,
    };
    let _window = block.add_window(&fd, &window).unwrap();
    let fail_from = |first| {
        kernel.fail(Some(Failures {
            first,
            count: usize::MAX,
            errno: libc::ENOMEM,
        }));
    };
    const STORM: u64 = 200;
    for _ in 0..STORM {
        // No window has it: the kernel hears of it, and keeps the memory that nobody uses.
        fail_from(1);
        vm.convert(8 * PAGE, PAGE, Private).unwrap();
        kernel.fail(None);
        vm.convert(8 * PAGE, PAGE, Shared).unwrap();
    }
    assert_eq!(block.stats().release_failures, STORM);
    let told = logged("double memory");
    assert!(told > 0 && told < STORM as usize, "{told}");
    // Out of the window, and neither private nor back.
    fail_from(1);
    vm.convert(0, PAGE, Private).unwrap_err();
    assert_ne!(block.stats().bytes_quarantined, 0);
    assert_eq!(logged("is quarantined"), 1);
    // Nor is lost memory, whatever is quarantined.
    block.poison(12 * PAGE, PAGE).unwrap();
    assert_eq!(logged("poisoned"), 1);
}
