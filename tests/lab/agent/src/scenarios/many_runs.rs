// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that leaves some hundred single private pages behind, on a host whose maple tree can't be taken apart then: the
//! lab's kernel with that fault back. However QEMU lets go of the file, the host comes to no harm, and if its VM runs
//! until the end, nobody who has the file sees what it wrote last. But if QEMU is killed: that shows that the fault is
//! there, and is seen.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::{Attempt, Failure};
use crate::host::kernel::MapleFaults;
use crate::host::messages::Messages;
use crate::ledger::PAGE;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
const START: u64 = 16 * MIB;
/// One after the other, they give the tree's root exactly 16 children.
const RUNS: u64 = 120;
/// The fault, and a message where it would strike.
const ROOT_OF_16: u32 = 2;
const REPORT: u32 = 4;
const COMPLAINT: &[&str] = &["BUG maple_node"];
const WOULD_STRIKE: &[&str] = &["maple_tree", "would be lost"];
const PATIENCE: Duration = Duration::from_secs(120);

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let Some(faults) = MapleFaults::back(ROOT_OF_16 | REPORT)? else {
        scenario.fact(
            "skipped",
            "this kernel can't have the maple tree's faults back",
        );
        return Ok(());
    };
    let mut messages = Messages::from_now()?;
    let mut reports = Messages::from_now()?;
    for end in ["power off", "quit", "SIGTERM", "rebuild"] {
        scenario.progress(end);
        let mut guest = start(scenario, end)?;
        match end {
            "power off" => {}
            "quit" => {
                guest.machine.qmp.execute("quit", json!({}))?;
            }
            "SIGTERM" => terminate(&guest)?,
            _ => {
                guest.machine.qmp.execute("system_reset", json!({}))?;
                guest.monitor.wait_until_ready()?;
                guest.ledger.reset();
            }
        }
        match end {
            "power off" | "rebuild" => guest.finish(scenario)?,
            _ => {
                guest.machine.wait_for_exit(PATIENCE)?;
                let said = guest.machine.complaints();
                let kept = said.lines().find(|line| line.contains("private runs"));
                scenario.check_equal(kept, None, format!("what QEMU says of runs at {end}"))?;
            }
        }
        let complaints = messages.count(COMPLAINT)?;
        scenario.fact(&format!("{end}: complaints of the kernel"), complaints);
        scenario.check_equal(
            complaints,
            0,
            format!("the kernel's complaints after {end}"),
        )?;
    }

    scenario.progress("exit");
    exit_while_it_runs(scenario)?;
    let complaints = messages.count(COMPLAINT)?;
    scenario.check_equal(complaints, 0, "the kernel's complaints after exit")?;

    // What can't be helped, and what would have been seen. Now the kernel only says what it would have done.
    drop(faults);
    let _reports = MapleFaults::back(REPORT)?;
    let mut guest = start(scenario, "SIGKILL")?;
    guest.machine.kill()?;
    let begun = Instant::now();
    while guest.machine.exited()?.is_none() {
        scenario.check(begun.elapsed() < PATIENCE, "a killed QEMU ends")?;
        std::thread::yield_now();
    }
    let seen = reports.find(WOULD_STRIKE, PATIENCE)?;
    scenario.fact("SIGKILL: the kernel says", seen.clone().unwrap_or_default());
    scenario.check(
        seen.is_some(),
        "the kernel frees a tree that it would have spoilt when QEMU is killed",
    )
}

fn start(scenario: &Scenario, end: &str) -> Result<Confidential, Failure> {
    let rebuilt = ["-machine", "x-change-vmfd-on-reset=on"];
    let mut guest = Confidential::with_one_block(
        scenario.directory(),
        RAM_BYTES,
        "",
        match end {
            "rebuild" => &rebuilt,
            "exit" => &["-smp", "1,maxcpus=2"],
            _ => &[],
        },
    )?;
    for run in 0..RUNS {
        guest.convert(scenario, START + 2 * run * PAGE, PAGE, true)?;
    }
    Ok(guest)
}

/// QEMU gives up in the middle of everything: for a processor that is plugged there is no file descriptor. The guest
/// writes private pages all the while. Whoever has the file then finds them shared, as every end leaves them, and empty.
fn exit_while_it_runs(scenario: &mut Scenario) -> Outcome {
    const FILLS: u64 = 400;
    let mut guest = start(scenario, "exit")?;
    let view = guest.shared[0].map(0..RAM_BYTES)?;
    let all = guest
        .machine
        .qmp
        .execute("query-hotpluggable-cpus", json!({}))?;
    let free = all.as_array().into_iter().flatten();
    let free = free.rev().find(|cpu| cpu["qom-path"].is_null());
    let free = free.attempt(|| format!("no processor can be plugged: {all}"))?;
    let mut processor = free["props"].clone();
    processor["driver"] = free["type"].clone();
    for seed in 1..=FILLS {
        guest
            .monitor
            .begin(&format!("fill {START:#x} {:#x} {seed}", 2 * RUNS * PAGE))?;
    }
    guest.machine.limit_files()?;
    // It does not answer.
    let answer = guest.machine.qmp.execute("device_add", processor);
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = guest.machine.exited()? {
            break status;
        }
        scenario.check(
            begun.elapsed() < PATIENCE,
            format!("QEMU exits that has no file descriptor for a processor: {answer:?}"),
        )?;
        std::thread::yield_now();
    };
    scenario.fact("exit: QEMU's status", status.to_string());
    scenario.fact("exit: QEMU says", guest.machine.complaints());
    scenario.check_equal(status.code(), Some(1), "QEMU's exit status")?;
    let mut written = 0;
    for run in 0..RUNS {
        let mut page = [0; PAGE as usize];
        let at = START + 2 * run * PAGE;
        view.read_into(&mut page, at)
            .attempt(|| format!("reading what was private at {at:#x}"))?;
        written += u64::from(page.iter().any(|byte| *byte != 0));
    }
    scenario.fact("exit: pages with bytes that were private", written);
    scenario.check_equal(written, 0, "pages with bytes that were private, after exit")
}

fn terminate(guest: &Confidential) -> Outcome {
    // SAFETY: no memory is passed; the process is a child that nobody has waited for.
    let sent = unsafe { libc::kill(guest.machine.pid() as libc::pid_t, libc::SIGTERM) };
    (sent == 0)
        .then_some(())
        .attempt(|| "sending SIGTERM to QEMU".into())
}
