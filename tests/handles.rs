// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a program holds of a block ends when it lets go of that, and never what somebody else has made there
//! since.

use gmem::kernel::fake::{FakeKernel, VmKind};
use gmem::Attribute::{Private, Shared};
use gmem::{Block, BlockConfig, Cause, Change, Gpa, Listener, Vm, WindowConfig};
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

const PAGE: u64 = gmem::PAGE_SIZE;
const SIZE: u64 = 8 * PAGE;
const GPA: u64 = 1 << 32;

struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    block: Arc<Block>,
    fd: File,
}

impl Rig {
    fn new() -> Self {
        let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let config = BlockConfig::confidential("ram", SIZE, Private);
        let block = Block::new(&vm, &config).unwrap();
        Self {
            kernel,
            vm,
            block,
            fd,
        }
    }

    fn config(&self) -> WindowConfig {
        WindowConfig {
            ioas_id: 0,
            offset: 0,
            length: SIZE,
            iova: 0,
            readonly: false,
        }
    }
}

#[test]
fn a_binding_that_is_dropped_ends_and_one_that_is_kept_does_not() {
    let rig = Rig::new();
    let binding = rig.block.bind(0, SIZE, GPA).unwrap();
    assert_eq!(binding.gpas().first(), GPA);
    assert_eq!(binding.offsets(), rig.block.span());
    assert!(rig.kernel.is_private(Gpa(GPA)));
    drop(binding);
    assert!(!rig.kernel.is_private(Gpa(GPA)));
    assert_eq!(rig.block.stats().bindings, 0);
    rig.block.bind(0, SIZE, GPA).unwrap().keep();
    assert!(rig.kernel.is_private(Gpa(GPA)));
    rig.block.unbind(0, SIZE, GPA).unwrap();
    assert!(!rig.kernel.is_private(Gpa(GPA)));
}

#[test]
fn a_binding_of_a_vm_that_is_gone_leaves_its_successor_alone() {
    let rig = Rig::new();
    let old = rig.block.bind(0, SIZE, GPA).unwrap();
    rig.vm.detach().unwrap();
    rig.kernel.rebuild_vm();
    rig.vm.attach(&rig.fd).unwrap();
    let new = rig.block.bind(0, SIZE, GPA).unwrap();
    old.unbind().unwrap();
    assert!(rig.kernel.is_private(Gpa(GPA)));
    assert_eq!(rig.block.stats().bindings, 1);
    new.unbind().unwrap();
    assert_eq!(rig.block.stats().bindings, 0);
}

#[test]
fn a_binding_that_the_kernel_would_not_end_says_so_and_is_made_up_for() {
    let rig = Rig::new();
    let binding = rig.block.bind(0, SIZE, GPA).unwrap();
    rig.kernel
        .fail_if(|call| (call == "KVM_SET_MEMORY_ATTRIBUTES").then_some(libc::ENOMEM));
    assert_eq!(binding.unbind().unwrap_err().errno(), libc::ENOMEM);
    rig.kernel.fail(None);
    assert_eq!(rig.block.stats().bindings, 0);
    rig.vm.convert(GPA, PAGE, Private).unwrap_err();
    rig.block.bind(0, SIZE, GPA).unwrap().keep();
    rig.vm.convert(GPA, PAGE, Shared).unwrap();
    assert!(!rig.kernel.is_private(Gpa(GPA)));
}

#[test]
fn a_window_that_is_dropped_shows_nothing_more() {
    let rig = Rig::new();
    rig.block.bind(0, SIZE, GPA).unwrap().keep();
    rig.vm.convert(GPA, SIZE, Shared).unwrap();
    let window = rig.block.add_window(&rig.fd, &rig.config()).unwrap();
    assert_eq!(window.mapped().0, SIZE);
    drop(window);
    assert_eq!(rig.kernel.areas(0), 0);
    assert_eq!(rig.block.stats().windows, 0);
    let window = rig.block.add_window(&rig.fd, &rig.config()).unwrap();
    window.remove().unwrap();
    assert_eq!(window.remove().unwrap_err().errno(), libc::EINVAL);
    // Whatever is there by then is another's.
    rig.block.add_window(&rig.fd, &rig.config()).unwrap().keep();
    drop(window);
    assert_ne!(rig.kernel.areas(0), 0);
}

#[test]
fn a_window_that_can_not_end_when_it_is_dropped_ends_later() {
    let rig = Rig::new();
    rig.block.bind(0, SIZE, GPA).unwrap().keep();
    rig.vm.convert(GPA, SIZE, Shared).unwrap();
    let window = rig.block.add_window(&rig.fd, &rig.config()).unwrap();
    rig.kernel.fail_if(|call| {
        ["IOMMU_IOAS_UNMAP", "IOMMU_IOAS_COPY"]
            .contains(&call)
            .then_some(libc::ENOMEM)
    });
    assert_eq!(window.remove().unwrap_err().errno(), libc::ENOMEM);
    drop(window);
    rig.vm.convert(GPA, PAGE, Private).unwrap_err();
    rig.kernel.fail(None);
    assert_eq!(rig.block.stats().windows, 1);
    rig.vm.convert(GPA, PAGE, Private).unwrap();
    let window = rig.block.add_window(&rig.fd, &rig.config()).unwrap();
    assert_eq!(rig.block.stats().windows, 1, "the old one has ended");
    assert_eq!(window.mapped().0, SIZE - PAGE);
}

#[test]
fn a_window_keeps_its_block_and_nothing_else_does() {
    let rig = Rig::new();
    let binding = rig.block.bind(0, SIZE, GPA).unwrap();
    let window = rig.block.add_window(&rig.fd, &rig.config()).unwrap();
    let listener = rig.block.add_listener(Arc::new(Ears::default()));
    rig.vm.convert(GPA, SIZE, Shared).unwrap();
    let Rig {
        block, kernel, vm, ..
    } = rig;
    drop(block);
    vm.convert(GPA, PAGE, Private).unwrap();
    assert_eq!(window.mapped().0, SIZE - PAGE);
    drop(window);
    assert_eq!(kernel.areas(0), 0);
    assert_eq!(
        vm.convert(GPA, PAGE, Private).unwrap_err().errno(),
        libc::EINVAL
    );
    drop(listener);
    binding.unbind().unwrap();
}

#[test]
fn a_window_that_somebody_holds_keeps_no_old_vm() {
    let rig = Rig::new();
    rig.block.bind(0, SIZE, GPA).unwrap().keep();
    rig.vm.convert(GPA, SIZE, Shared).unwrap();
    let window = rig.block.add_window(&rig.fd, &rig.config()).unwrap();
    drop(rig.block);
    rig.vm.detach().unwrap();
    assert_eq!((rig.kernel.areas(0), window.mapped().0), (0, 0));
}

#[derive(Default)]
struct Ears(AtomicU64);

impl Listener for Ears {
    fn begin(&self, _: &Change) -> Result<(), i32> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn end(&self, _: &Change, _: bool) {}
}

#[test]
fn a_listener_hears_as_long_as_its_registration_is_held() {
    let rig = Rig::new();
    rig.block.bind(0, SIZE, GPA).unwrap().keep();
    let ears = Arc::new(Ears::default());
    let registration = rig.block.add_listener(ears.clone());
    rig.vm.convert(GPA, PAGE, Shared).unwrap();
    assert_eq!(ears.0.load(Ordering::SeqCst), 1);
    drop(registration);
    rig.vm.convert(GPA, PAGE, Private).unwrap();
    assert_eq!(ears.0.load(Ordering::SeqCst), 1);
    assert_eq!(Arc::strong_count(&ears), 1);
    rig.block.add_listener(ears.clone()).keep();
    rig.vm.convert(GPA, PAGE, Shared).unwrap();
    assert_eq!(ears.0.load(Ordering::SeqCst), 2);
}

#[test]
fn a_vm_that_is_dropped_leaves_its_blocks_to_end_well() {
    let Rig {
        kernel,
        vm,
        block,
        fd,
    } = Rig::new();
    let binding = block.bind(0, SIZE, GPA).unwrap();
    drop(vm);
    block.add_window(&fd, &Rig::new().config()).unwrap().keep();
    binding.unbind().unwrap();
    assert!(!kernel.is_private(Gpa(GPA)));
    drop(block);
    assert_eq!(kernel.violations(), Vec::<String>::new());
}

#[test]
fn a_vm_at_its_end_is_not_made_anew() {
    let rig = Rig::new();
    rig.vm.end().unwrap();
    assert!(matches!(rig.vm.detach().unwrap_err().cause(), Cause::Ended));
    assert!(matches!(
        rig.vm.attach(&rig.fd).unwrap_err().cause(),
        Cause::Ended
    ));
}
