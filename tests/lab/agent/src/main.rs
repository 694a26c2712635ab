// SPDX-License-Identifier: MIT OR Apache-2.0
//! PID 1 of the lab's virtual host (L1) and, when the kernel command line says so, of a Linux guest (L2).
//!
//! In L1 it runs the scenarios named by `lab.run` one after the other, reports each as JSON lines on ttyS1 and powers
//! off. Everything in a report was measured in this run: a scenario is ok only if each of its checks held.
//!
//! Started as anything else than a machine's init it is `gmem-host`: the same scenarios on somebody's own machine.

mod bench;
mod boot;
mod confidential;
mod debugger;
mod dma;
mod failure;
mod host;
mod job;
mod ledger;
mod lines;
mod linux_guest;
mod machine;
mod monitor;
mod on_host;
mod place;
mod plugging;
mod qmp;
mod rebuilt;
mod release;
mod report;
mod scenario;
mod scenarios;
mod secrets;
mod small_guest;
mod tee;
mod test_disk;
mod test_port;
mod virtio;
mod vmcore;

use boot::CommandLine;
use report::Report;
use std::process::ExitCode;

/// Where L1 reports. The console on ttyS0 carries kernel messages and must not be parsed.
const REPORT_PORT: &str = "/dev/ttyS1";

fn main() -> ExitCode {
    // Elsewhere, containers included, nothing may be mounted or powered off.
    if !boot::is_init() {
        return on_host::run();
    }
    if let Err(failure) = run() {
        eprintln!("agent: {failure}");
    }
    boot::power_off();
}

fn run() -> Result<(), failure::Failure> {
    boot::mount_all()?;
    let command_line = CommandLine::read()?;
    match command_line.value("lab.role") {
        Some("l2") => job::run(&command_line),
        _ => host(&command_line),
    }
}

fn host(command_line: &CommandLine) -> Result<(), failure::Failure> {
    boot::prepare_host()?;
    let run = command_line.value("lab.run").unwrap_or("shell");
    if run == "shell" {
        return boot::shell();
    }
    let report = Report::open(REPORT_PORT)?;
    for name in run.split(',').filter(|name| !name.is_empty()) {
        scenario::run(name, &report, command_line);
    }
    report.done();
    Ok(())
}
