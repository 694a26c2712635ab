// SPDX-License-Identifier: MIT OR Apache-2.0
//! Linux guests with plain RAM: show that the lab itself is sound, its timers too. Nothing of gmem is involved.

use crate::boot::CommandLine;
use crate::linux_guest::LinuxGuest;
use crate::scenario::{Outcome, Scenario};

const PATTERN_BYTES: u64 = 160 << 20;
/// What the guest's half second of short sleeps may take on a loaded machine; timers that are broken take minutes.
const SLEEPS_LIMIT_MILLISECONDS: u64 = 20_000;
const MACHINE: [&str; 6] = ["-machine", "q35,accel=kvm", "-m", "256M", "-smp", "2"];

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let directory = scenario.directory().join("sleeps");
    let mut guest = LinuxGuest::start(&directory, &MACHINE, "lab.job=idle")?;
    let result = guest.result()?;
    scenario.fact("sleeps", result["sleeps"].clone());
    scenario.fact("sleeps_milliseconds", result["milliseconds"].clone());
    scenario.check(
        result["milliseconds"]
            .as_u64()
            .is_some_and(|took| took < SLEEPS_LIMIT_MILLISECONDS),
        format!("the guest's timers come in time: {result}"),
    )?;
    guest.finish()?;

    let directory = scenario.directory().join("pattern");
    let job = format!("lab.job=pattern lab.bytes={PATTERN_BYTES}");
    let mut guest = LinuxGuest::start(&directory, &MACHINE, &job)?;
    let result = guest.result()?;
    scenario.fact("pattern_bytes", result["bytes"].clone());
    scenario.check_equal(
        result["bytes"].as_u64(),
        Some(PATTERN_BYTES),
        "bytes written and verified",
    )?;
    guest.finish()
}
