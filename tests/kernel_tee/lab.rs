// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's parameters of this.

use crate::common::skipped;
use std::io;
use std::path::Path;

const OFFERED: &str = "/sys/module/kvm/parameters/lab_tee";
const FAIL: &str = "/sys/module/kvm/parameters/lab_tee_fail";

/// VM types as long as this lives: 1 SNP, 2 TDX. Nothing fails on purpose.
pub struct Offered;

impl Offered {
    /// Or a printed reason.
    pub fn new(test: &str, types: u32) -> Option<Self> {
        if !Path::new(OFFERED).exists() {
            skipped(test, "this kernel has no kvm.lab_tee");
            return None;
        }
        offer(types).unwrap();
        Some(Self)
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        // A panic says more than a second one.
        let _ = std::fs::write(OFFERED, "0");
        let _ = std::fs::write(FAIL, "none");
    }
}

pub fn offer(types: u32) -> io::Result<()> {
    std::fs::write(OFFERED, types.to_string())
}

/// Lets the N-th command of that name fail: `NAME,N,ERRNO`.
pub fn fail(what: &str) -> Result<(), i32> {
    std::fs::write(FAIL, what).map_err(|error| error.raw_os_error().unwrap())
}

/// What is left of it.
pub fn failing() -> String {
    std::fs::read_to_string(FAIL).unwrap().trim().to_string()
}
