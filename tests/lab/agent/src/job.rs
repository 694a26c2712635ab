// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a Linux guest is there for: one job, results as JSON lines on its only serial port.

use crate::boot::CommandLine;
use crate::failure::Failure;

/// Runs the job that `lab.job` names.
pub fn run(command_line: &CommandLine) -> Result<(), Failure> {
    let job = command_line.value("lab.job").unwrap_or("idle");
    match job {
        "idle" => Ok(()),
        _ => Err(Failure::new(format!("there is no job {job}"))),
    }
}
