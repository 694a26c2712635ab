// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest_memfd of the VMM's own, converted in place.

use gmem::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem::kernel::Kernel;
use gmem::Attribute::{Private, Shared};
use gmem::{Cause, Vm, PAGE_SIZE as PAGE};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    file: OwnedFd,
}

impl Rig {
    fn new(kind: VmKind) -> Self {
        let kernel = Arc::new(FakeKernel::new(kind));
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let file = kernel.create_guest_memfd(fd.as_fd(), 16 * PAGE, 0, 0);
        Self {
            kernel,
            vm,
            file: file.unwrap(),
        }
    }
}

#[test]
fn a_file_that_is_no_blocks_converts_as_a_whole_or_not_at_all() {
    let rig = Rig::new(VmKind::InPlace);
    let convert = |attribute| rig.vm.convert_file(&rig.file, PAGE, 2 * PAGE, attribute);
    convert(Shared).unwrap();
    convert(Shared).unwrap();
    convert(Private).unwrap();
    for errno in [libc::ENOMEM, libc::EIO] {
        let count = 1;
        let first = 0;
        rig.kernel.fail(Some(Failures {
            first,
            count,
            errno,
        }));
        let error = convert(Shared).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        assert!(
            error.to_string().contains("offset 0x1000..0x3000"),
            "{error}"
        );
        rig.kernel.fail(None);
    }
    // Interruptions and pages that are held for a moment are the library's matter.
    for errno in [libc::EAGAIN, libc::EINTR] {
        let count = 3;
        let first = 0;
        rig.kernel.fail(Some(Failures {
            first,
            count,
            errno,
        }));
        convert(Shared).unwrap();
        convert(Private).unwrap();
        rig.kernel.fail(None);
    }
}

#[test]
fn what_no_kernel_can_do_with_a_file_is_refused() {
    let rig = Rig::new(VmKind::InPlace);
    for (offset, size) in [
        (0, 0),
        (1, PAGE),
        (0, PAGE + 1),
        (u64::MAX - PAGE + 1, 2 * PAGE),
    ] {
        let error = rig.vm.convert_file(&rig.file, offset, size, Shared);
        let error = error.unwrap_err();
        assert_eq!(error.cause(), &Cause::Invalid, "{error}");
    }
    for kind in [VmKind::Confidential, VmKind::Ordinary] {
        let rig = Rig::new(kind);
        let error = rig.vm.convert_file(&rig.file, 0, PAGE, Shared).unwrap_err();
        assert_eq!(error.cause(), &Cause::Unsupported, "{error}");
    }
}
