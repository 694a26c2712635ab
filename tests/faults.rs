// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory faults of a guest: what is asked for is converted, an echo of somebody else's conversion never is, however long
//! the vCPU was kept from its processor, and what can't be served is told from what can't be served now.

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::{
    Attribute, Block, BlockConfig, Change, ConvertUnit, Gpa, Listener, MemoryFault, Span, Vm,
};
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const SIZE: u64 = 1 << 20;
const GPA: u64 = 1 << 30;

struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    block: Arc<Block>,
    _fd: File,
}

impl Rig {
    fn new(kind: VmKind) -> Self {
        let config = match kind {
            VmKind::Ordinary => BlockConfig::new("ram", SIZE),
            _ => BlockConfig::confidential("ram", SIZE, Shared),
        };
        Self::with(kind, config)
    }

    fn with(kind: VmKind, config: BlockConfig) -> Self {
        let kernel = Arc::new(FakeKernel::new(kind));
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let block = Block::new(&vm, &config).unwrap();
        let gpas = Span::new(Gpa(GPA), SIZE).unwrap();
        kernel.add_slot(gpas, block.file(Private), 0);
        block.bind(0, SIZE, GPA).unwrap().keep();
        let _fd = fd;
        Self {
            kernel,
            vm,
            block,
            _fd,
        }
    }

    /// What a vCPU notes before it enters KVM_RUN.
    fn enter(&self) -> u64 {
        self.vm.sequence().load(Ordering::Acquire)
    }

    fn fault(&self, page: u64, attribute: Attribute, entered: u64) -> MemoryFault {
        let gpa = GPA + page * PAGE;
        self.vm.memory_fault(gpa, PAGE, attribute, true, entered)
    }

    fn attribute(&self, page: u64) -> Attribute {
        self.block.run_at(page * PAGE).unwrap().0
    }
}

fn confidential() -> impl Iterator<Item = Rig> {
    [VmKind::Confidential, VmKind::InPlace]
        .into_iter()
        .map(Rig::new)
}

#[test]
fn an_access_of_the_other_kind_converts_at_once() {
    for rig in confidential() {
        for attribute in [Private, Shared] {
            assert_eq!(
                rig.fault(3, attribute, rig.enter()),
                MemoryFault::Served,
                "{attribute:?}"
            );
            assert_eq!(rig.attribute(3), attribute);
        }
        assert_eq!(rig.kernel.violations(), Vec::<String>::new());
    }
}

/// The cgroup that throttles a vCPU may take any time between its entry and its fault, and so may another vCPU's
/// conversions elsewhere.
#[test]
fn a_fault_is_real_whatever_time_has_passed_and_whatever_was_converted_elsewhere() {
    for rig in confidential() {
        let entered = rig.enter();
        for _ in 0..1000 {
            for attribute in [Private, Shared] {
                rig.vm.convert(GPA + SIZE / 2, PAGE, attribute).unwrap();
            }
        }
        assert_eq!(rig.fault(3, Private, entered), MemoryFault::Served);
        assert_eq!(rig.attribute(3), Private);
    }
}

#[test]
fn an_echo_of_a_conversion_converts_nothing() {
    for rig in confidential() {
        let entered = rig.enter();
        rig.vm.convert(GPA + 3 * PAGE, PAGE, Private).unwrap();
        // The access was shared when the kernel looked first, and the page private when it looked again.
        assert_eq!(rig.fault(3, Shared, entered), MemoryFault::Echo);
        assert_eq!(rig.attribute(3), Private);
        // The other vCPU may have been back and forth: nothing is wrong then, either.
        rig.vm.convert(GPA + 3 * PAGE, PAGE, Shared).unwrap();
        assert_eq!(rig.fault(3, Shared, entered), MemoryFault::Echo);
        // What was meant comes again, and no conversion is in between.
        assert_eq!(rig.fault(3, Private, rig.enter()), MemoryFault::Served);
        assert_eq!(rig.attribute(3), Private);
        // Nor need a vCPU wait for the end of a storm.
        let entered = rig.enter();
        rig.vm.convert(GPA + 3 * PAGE, PAGE, Shared).unwrap();
        assert_eq!(rig.fault(3, Private, entered), MemoryFault::Echo);
        assert_eq!(rig.fault(3, Private, u64::MAX), MemoryFault::Served);
    }
}

/// Asks about its own range in the middle of a conversion, as a vCPU does that faults then.
struct Midway {
    vm: Arc<Vm>,
    entered: AtomicU64,
    echo: AtomicBool,
}

impl Listener for Midway {
    fn begin(&self, _: &Change) -> Result<(), i32> {
        let entered = self.entered.load(Ordering::Relaxed);
        let fault = self
            .vm
            .memory_fault(GPA + 3 * PAGE, PAGE, Shared, false, entered);
        self.echo
            .store(fault == MemoryFault::Echo, Ordering::Relaxed);
        Ok(())
    }
    fn end(&self, _: &Change, _: bool) {}
}

#[test]
fn a_conversion_under_way_is_heard_by_those_who_entered_after_its_beginning() {
    for rig in confidential() {
        let midway = Arc::new(Midway {
            vm: rig.vm.clone(),
            entered: AtomicU64::new(rig.enter()),
            echo: AtomicBool::default(),
        });
        let listener = rig.block.add_listener(midway.clone());
        rig.vm.convert(GPA + 3 * PAGE, PAGE, Private).unwrap();
        assert!(midway.echo.load(Ordering::Relaxed));
        // A conversion that changes nothing is none.
        midway.echo.store(false, Ordering::Relaxed);
        rig.vm.convert(GPA + 3 * PAGE, PAGE, Private).unwrap();
        assert!(!midway.echo.load(Ordering::Relaxed));
        drop(listener);
    }
}

#[test]
fn a_failed_conversion_echoes_too() {
    for rig in confidential() {
        let entered = rig.enter();
        fail(&rig, libc::ENOMEM);
        rig.vm
            .convert(GPA + 3 * PAGE, PAGE, Private)
            .expect_err("the kernel is out of memory");
        rig.kernel.fail(None);
        assert_eq!(rig.fault(3, Private, entered), MemoryFault::Echo);
        assert_eq!(rig.fault(3, Private, rig.enter()), MemoryFault::Served);
    }
}

fn fail(rig: &Rig, errno: i32) {
    rig.kernel.fail(Some(Failures {
        first: 0,
        count: 1000,
        errno,
    }));
}

#[test]
fn what_the_host_or_the_guest_may_free_is_waited_for() {
    for rig in confidential() {
        for errno in [libc::ENOMEM, libc::EAGAIN, libc::ENOSPC] {
            fail(&rig, errno);
            let fault = rig.fault(3, Private, rig.enter());
            rig.kernel.fail(None);
            assert!(
                matches!(&fault, MemoryFault::Later(error) if error.errno() == errno),
                "{fault:?}"
            );
            assert_eq!(rig.attribute(3), Shared);
        }
        assert_eq!(rig.fault(3, Private, rig.enter()), MemoryFault::Served);
        rig.vm.detach().unwrap();
        let fault = rig.fault(3, Private, rig.enter());
        assert!(matches!(fault, MemoryFault::Later(_)), "{fault:?}");
    }
    let max_runs = Some(2);
    let config = BlockConfig {
        max_runs,
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", SIZE, Shared)
    };
    let rig = Rig::with(VmKind::Confidential, config);
    for page in [1, 3] {
        assert_eq!(rig.fault(page, Private, rig.enter()), MemoryFault::Served);
    }
    let fault = rig.fault(5, Private, rig.enter());
    assert!(
        matches!(&fault, MemoryFault::Later(error) if error.errno() == libc::ENOSPC),
        "{fault:?}"
    );
    assert_eq!(rig.fault(3, Shared, rig.enter()), MemoryFault::Served);
    assert_eq!(rig.fault(5, Private, rig.enter()), MemoryFault::Served);
}

#[test]
fn what_nobody_can_serve_says_why() {
    let never = |rig: &Rig, gpa: u64, size: u64, attribute, word: &str| {
        let fault = rig.vm.memory_fault(gpa, size, attribute, true, rig.enter());
        let MemoryFault::Never(error) = fault else {
            panic!("{word}: {fault:?}");
        };
        assert!(error.to_string().contains(word), "{error}");
    };
    for rig in confidential() {
        for attribute in [Private, Shared] {
            never(&rig, GPA + SIZE, PAGE, attribute, "not guest memory");
            never(&rig, GPA - PAGE, 2 * PAGE, attribute, "not guest memory");
            never(&rig, GPA, 0, attribute, "empty");
            never(&rig, u64::MAX - 1, PAGE, attribute, "wrap");
        }
        rig.vm.poison(GPA + 3 * PAGE, PAGE).unwrap();
        never(&rig, GPA + 3 * PAGE, PAGE, Private, "poisoned");
        fail(&rig, libc::EPERM);
        never(&rig, GPA, PAGE, Private, "Operation not permitted");
        rig.kernel.fail(None);
    }
    let config = BlockConfig {
        convert_unit: ConvertUnit::Off,
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", SIZE, Shared)
    };
    let rig = Rig::with(VmKind::Confidential, config);
    never(&rig, GPA, PAGE, Private, "convert-unit");
    never(
        &Rig::new(VmKind::Ordinary),
        GPA,
        PAGE,
        Private,
        "ordinary VM",
    );
}

#[test]
fn what_nothing_explains_is_told_from_what_can_be_served() {
    for rig in confidential() {
        let fault = rig.fault(3, Shared, rig.enter());
        assert!(matches!(fault, MemoryFault::Unexplained(_)), "{fault:?}");
        // The kind of an access follows the attribute there: a fault asks for nothing.
        let fault = rig.vm.memory_fault(GPA, PAGE, Private, false, rig.enter());
        assert!(matches!(fault, MemoryFault::Unexplained(_)), "{fault:?}");
        assert_eq!(rig.attribute(0), Shared);
    }
}
