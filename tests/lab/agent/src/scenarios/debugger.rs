// SPDX-License-Identifier: MIT OR Apache-2.0
//! A debugger at a confidential guest reads and writes what is shared. What is private it is refused, with an error that it
//! sees: nothing is written that the guest never finds, and no memory comes up beside the private page.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::host::gdb::Debugger;
use crate::ledger::PAGE;
use crate::monitor::protocol::pattern;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::path::Path;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
const PRIVATE: u64 = 16 * MIB;
const BYTES: u64 = 2 * MIB;
const SHARED: u64 = PRIVATE - PAGE;
const SEED: u64 = 9;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let socket = scenario.directory().join("gdb.sock");
    let chardev = format!(
        "socket,id=gdb0,path={},server=on,wait=off",
        socket.display()
    );
    let mut guest = Confidential::with_one_block(
        scenario.directory(),
        RAM_BYTES,
        "",
        &["-chardev", &chardev, "-gdb", "chardev:gdb0"],
    )?;
    guest.convert(scenario, PRIVATE, BYTES, true)?;
    guest.fill(SHARED, BYTES + 2 * PAGE, SEED)?;
    guest.agree(scenario, "before")?;

    // What a guest's reset does and does not leave behind is the same for the next debugger.
    for time in ["at first", "after a reset"] {
        scenario.prefix(&format!("{time}: "));
        for physical in [false, true] {
            attach(scenario, &socket, physical)?;
            guest.agree(scenario, "after the debugger")?;
        }
        if time == "at first" {
            guest.machine.qmp.execute("system_reset", json!({}))?;
            guest.monitor.wait_until_ready()?;
            guest.ledger.reset();
            guest.convert(scenario, PRIVATE, BYTES, true)?;
            guest.fill(SHARED, BYTES + 2 * PAGE, SEED)?;
        }
    }
    scenario.prefix("");
    guest.finish(scenario)
}

fn attach(scenario: &mut Scenario, socket: &Path, physical: bool) -> Outcome {
    let by = if physical { "physical" } else { "virtual" };
    let mut debugger = Debugger::attach(socket)?;
    let answer = debugger.physical(physical)?;
    scenario.check_equal(answer.as_str(), "OK", "the stub's word on kinds of address")?;
    for at in [PRIVATE, PRIVATE + BYTES - 8] {
        let said = debugger.write(at, 0xdead)?;
        scenario.check(
            said.starts_with('E'),
            format!("a write to the private {at:#x} by {by} address is an error: {said}"),
        )?;
        scenario.fact(&format!("write to a private page, {by} address"), said);
        let said = debugger.read(at)?;
        scenario.check(
            matches!(&said, Err(error) if error.starts_with('E')),
            format!("a read of the private {at:#x} by {by} address is an error: {said:?}"),
        )?;
    }
    if !physical {
        let said = debugger.set_breakpoint(PRIVATE + PAGE)?;
        scenario.check(
            said.starts_with('E'),
            format!("a breakpoint in a private page is an error: {said}"),
        )?;
        scenario.fact("breakpoint in a private page", said);
    }
    let own = pattern(SEED, SHARED);
    let said = debugger.write(SHARED, !own)?;
    scenario.check_equal(said.as_str(), "OK", "a write to a shared page")?;
    scenario.check_equal(debugger.read(SHARED)?, Ok(!own), "what was written there")?;
    debugger.write(SHARED, own)?;
    debugger.physical(false)?;
    debugger.detach()
}
