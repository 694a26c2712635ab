// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hosts that can't serve: they are told so in a sentence, before anything is made.

use gmem::kernel::fake::{FakeKernel, VmKind};
use gmem::{Cause, Vm};
use std::fs::File;
use std::sync::Arc;

#[test]
fn a_host_with_larger_pages_is_refused_by_name() {
    let kernel = Arc::new(FakeKernel::new(VmKind::Confidential));
    let fd = File::open("/dev/null").unwrap();
    kernel.set_host_page_size(64 << 10);
    let error = Vm::with_kernel(kernel, &fd).unwrap_err();
    assert!(matches!(error.cause(), Cause::Unsupported), "{error}");
    assert!(error.to_string().contains("pages of 64 KiB"), "{error}");
}
