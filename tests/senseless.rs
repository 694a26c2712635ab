// SPDX-License-Identifier: MIT OR Apache-2.0
//! Senseless things that a VMM in Rust can hand in: each gets an error, or does no harm.

use gmem::kernel::fake::{FakeKernel, VmKind};
use gmem::Attribute::{Private, Shared};
use gmem::{Block, BlockConfig, Change, Listener, Vm};
use std::fs::File;
use std::sync::Arc;

const SIZE: u64 = 64 << 20;

fn vm() -> Arc<Vm> {
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let fd = File::open("/dev/null").unwrap();
    Vm::with_kernel(kernel, &fd).unwrap()
}

fn block(vm: &Arc<Vm>, name: &str) -> Arc<Block> {
    Block::new(vm, &BlockConfig::confidential(name, SIZE, Shared)).unwrap()
}

#[test]
fn any_number_of_threads_fills_memory() {
    let vm = vm();
    for threads in [0, 1, 3, 1 << 20, usize::MAX] {
        block(&vm, "ram").preallocate(threads).unwrap();
    }
}

/// A log's reader takes a line for a line, and a terminal's escapes for what they say.
#[test]
fn names_are_one_line() {
    let vm = vm();
    let refused = BlockConfig::confidential("two\nlines\x1b[31m", 1, Shared);
    let error = Block::new(&vm, &refused).unwrap_err();
    assert!(error.to_string().starts_with("two?lines?[31m: a size of"));
    let block = block(&vm, "two\nlines\x1b[31m");
    let error = block.bind(0, 1, 0).unwrap_err();
    assert!(error.to_string().starts_with("two?lines?[31m: 0x1 bytes"));
}

struct Refusing(i32);

impl Listener for Refusing {
    fn begin(&self, _: &Change) -> Result<(), i32> {
        Err(self.0)
    }

    fn end(&self, _: &Change, _: bool) {}
}

/// What is no errno would be no error in C, or one of another sign.
#[test]
fn a_refusal_has_an_errno() {
    let vm = vm();
    let block = block(&vm, "ram");
    block.bind(0, SIZE, 0).unwrap().keep();
    for (said, errno) in [
        (libc::EPERM, libc::EPERM),
        (0, libc::EIO),
        (-5, libc::EIO),
        (i32::MIN, libc::EIO),
        (4096, libc::EIO),
    ] {
        let listener = block.add_listener(Arc::new(Refusing(said)));
        let error = vm.convert(0, SIZE, Private).unwrap_err();
        assert_eq!(error.errno(), errno, "{said}");
        drop(listener);
    }
    vm.convert(0, SIZE, Private).unwrap();
}
