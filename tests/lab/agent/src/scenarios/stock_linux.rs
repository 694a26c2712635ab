// SPDX-License-Identifier: MIT OR Apache-2.0
//! A Linux guest with plain RAM: shows that the lab itself is sound. Nothing of gmem is involved.

use crate::boot::CommandLine;
use crate::linux_guest::LinuxGuest;
use crate::scenario::{Outcome, Scenario};

const PATTERN_BYTES: u64 = 160 << 20;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let mut guest = LinuxGuest::start(
        scenario.directory(),
        &["-machine", "q35,accel=kvm", "-m", "256M", "-smp", "1"],
        &format!("lab.job=pattern lab.bytes={PATTERN_BYTES}"),
    )?;
    let result = guest.result()?;
    scenario.progress("pattern written and verified");
    scenario.fact("pattern_bytes", result["bytes"].clone());
    scenario.check_equal(
        result["bytes"].as_u64(),
        Some(PATTERN_BYTES),
        "bytes written and verified",
    )?;
    guest.finish()
}
