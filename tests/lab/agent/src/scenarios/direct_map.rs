// SPDX-License-Identifier: MIT OR Apache-2.0
//! direct-map=off where the kernel can't: refused with a sentence, before the guest starts.

use crate::boot::CommandLine;
use crate::machine::Machine;
use crate::scenario::{Outcome, Scenario};

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let said = Machine::refusal(
        scenario.directory(),
        &[
            "-object",
            "memory-backend-gmem,id=ram0,size=64M,direct-map=off",
            "-m",
            "64M",
            "-machine",
            "q35,accel=kvm,smm=off,memory-backend=ram0",
        ],
    )?;
    scenario.fact("direct-map=off", said.clone());
    scenario.check(
        said.contains("direct-map") || said.contains("direct map"),
        format!("the refusal names the property: {said}"),
    )
}
