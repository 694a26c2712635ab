// SPDX-License-Identifier: MIT OR Apache-2.0
//! The smallest guest on a guest_memfd: the least that a host has to be able to run. A software KVM can.

use crate::boot::CommandLine;
use crate::host::files;
use crate::host::memory::{backing, guest_memfds};
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use crate::small_guest::{SmallGuest, END, RAM_BYTES, START};
use serde_json::json;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let mut guest = SmallGuest::start(
        scenario.directory(),
        "memory-backend-gmem",
        &["-machine", "q35,accel=kvm,memory-backend=ram0"],
    )?;
    let pid = guest.machine.pid();
    let mapping = backing(pid, RAM_BYTES)?;
    scenario.fact("mapping", mapping.path.clone());
    scenario.check(
        mapping.is_guest_memfd(),
        "the mapping behind RAM is of a guest_memfd",
    )?;
    scenario.check_equal(guest_memfds(pid)?.len(), 1, "guest_memfds that QEMU holds")?;
    files::are_kept(scenario, pid, &[], "the guest at work")?;
    for _ in 0..2 {
        guest.write()?;
        guest.read()?;
    }
    scenario.fact("bytes that the guest's writes are spread over", END - START);
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    let block = gmem.block("ram0")?;
    scenario.fact("backing", block.text("backing")?);
    for (name, expected) in [("size", RAM_BYTES), ("private", 0), ("shared", RAM_BYTES)] {
        scenario.check_equal(
            block.number(name)?,
            expected,
            format!("query-gmem's {name}"),
        )?;
    }
    guest.machine.qmp.execute("system_reset", json!({}))?;
    guest.is_ready()?;
    guest.write()?;
    guest.read()?;
    guest.end()
}
