// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happens to a VM around its rebuilds: many in a row, with an image that is loaded each time, while it stands still, with
//! a memory module that came later, and such that fail: for want of a file descriptor, as soon as one is missing somewhere.
//! A rebuild that failed leaves a QEMU that says so, runs nothing and rebuilds when it is asked again. Memory that the kernel
//! can't make a slot for stops the VM, too.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::Engine;
use crate::failure::{Attempt, Failure};
use crate::host::faults::Faults;
use crate::host::kernel;
use crate::host::passthrough::{to_vfio, EDU};
use crate::ledger::{Block, PAGE};
use crate::machine::{Machine, Surroundings};
use crate::monitor::Monitor;
use crate::qmp::Gmem;
use crate::rebuilt::{self, reset, status, MIB, ORIGIN, PATIENCE, PRIVATE};
use crate::scenario::{Outcome, Scenario};
use serde_json::{json, Value};
use std::fs;
use std::time::Instant;

const RAM_BYTES: u64 = 64 * MIB;
const DIMM_BYTES: u64 = 32 * MIB;
const PRIVATE_BYTES: u64 = 4 * MIB;
const REBUILDS: usize = 20;
/// What allocators keep and pools grow by, not one reset handler or image.
const HEAP_SLACK_BYTES: u64 = MIB;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    scenario.prefix("many with an image: ");
    many_with_an_image(scenario)?;

    scenario.prefix("no slot at start: ");
    no_slot_at_start(scenario)?;

    let device = to_vfio(&EDU)?;
    let more = ["-m", "slots=2,maxmem=1G"];
    let surroundings = Surroundings::default();
    let directory = scenario.directory();
    let mut guest = rebuilt::with_device(directory, RAM_BYTES, &device, &more, surroundings)?;
    scenario.prefix("PAM registers: ");
    pam_registers(scenario, &mut guest)?;
    scenario.prefix("stopped: ");
    stopped(scenario, &mut guest)?;
    scenario.prefix("no slot: ");
    no_slot(scenario, &mut guest)?;
    scenario.prefix("with a module: ");
    with_a_module(scenario, &mut guest)?;
    scenario.prefix("no memory for a VM: ");
    no_new_vm(scenario, &mut guest)?;
    scenario.prefix("");
    scenario.fact("agreements", guest.agreements);
    guest.finish(scenario)
}

/// Private and anonymous memory of a process: its heap, mostly.
fn heap_bytes(pid: u32) -> Result<u64, Failure> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).attempt(|| format!("reading {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .attempt(|| format!("{path} has no RssAnon"))
}

/// A guest that QEMU itself loads, whose VM is rebuilt again and again.
fn many_with_an_image(scenario: &mut Scenario) -> Outcome {
    let (mut machine, serial) = rebuilt::with_image(
        &scenario.directory().join("image"),
        RAM_BYTES,
        &["-machine", "x-change-vmfd-on-reset=on"],
    )?;
    let mut monitor = Monitor::new(serial)?;
    let mut heap = 0;
    let mut requests = None;
    for number in 0..REBUILDS {
        let before = Gmem::query(&mut machine.qmp)?.total("requests")?;
        machine.qmp.execute("system_reset", json!({}))?;
        monitor.wait_until_ready()?;
        let during = Gmem::query(&mut machine.qmp)?.total("requests")? - before;
        let first = *requests.get_or_insert(during);
        scenario.check_equal(during, first, "conversions that a rebuild makes")?;
        if number == 4 {
            heap = heap_bytes(machine.pid())?;
        }
    }
    let grown = heap_bytes(machine.pid())?.saturating_sub(heap);
    scenario.fact("rebuilds", REBUILDS);
    scenario.fact("conversions in each", requests);
    scenario.fact("bytes that QEMU grew by", grown);
    scenario.check(
        grown <= HEAP_SLACK_BYTES,
        format!(
            "QEMU does not grow with rebuilds: {grown} bytes in {}",
            REBUILDS - 5
        ),
    )?;

    let private = !kernel::in_place();
    let result = monitor.convert(PRIVATE, PRIVATE_BYTES, private)?;
    scenario.check_equal(result, 0, "a conversion after that")?;
    monitor.fill(PRIVATE, PRIVATE_BYTES, 5)?;
    let difference = monitor.check(PRIVATE, PRIVATE_BYTES, 5)?;
    scenario.check_equal(difference, None, "what the guest reads of it")?;
    monitor.power_off()?;
    machine.wait_for_exit(PATIENCE)
}

fn hmp(guest: &mut Confidential, line: &str) -> Result<String, Failure> {
    let answer = guest
        .machine
        .qmp
        .execute("human-monitor-command", json!({"command-line": line}))?;
    Ok(answer.as_str().unwrap_or_default().to_string())
}

/// The guest has started anew: everything is as at first, and a device reaches it.
fn as_at_first(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    rebuilt::started_anew(guest)?;
    guest.agree(scenario, "after the rebuild")?;
    Engine::new(0, ORIGIN).reaches(scenario, guest, PRIVATE + PAGE)?;
    guest.convert(scenario, PRIVATE, PRIVATE_BYTES, true)?;
    guest.fill(PRIVATE, PRIVATE_BYTES, 9)?;
    guest.agree(scenario, "in the rebuilt VM")
}

/// q35's registers that say where the BIOS's addresses are RAM.
fn pam(guest: &mut Confidential) -> Result<Vec<String>, Failure> {
    let mut words = Vec::new();
    for offset in [0x90, 0x94] {
        hmp(guest, &format!("o/w 0xcf8 {:#x}", 0x8000_0000u32 + offset))?;
        let answer = hmp(guest, "i/w 0xcfc")?;
        let value = answer.split_ascii_whitespace().last();
        words.push(value.unwrap_or_default().to_string());
    }
    Ok(words)
}

/// Only a reset that makes new memory shows the ROM again. One that does not leaves the registers, as stock QEMU has it.
fn pam_registers(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let rebuild = |guest: &mut Confidential, on: bool| {
        let arguments =
            json!({"path": "/machine", "property": "x-change-vmfd-on-reset", "value": on});
        guest.machine.qmp.execute("qom-set", arguments)
    };
    let shadowed = pam(guest)?;
    scenario.fact("of a guest that runs", shadowed.join(" "));
    guest.machine.qmp.execute("stop", json!({}))?;
    reset(&mut guest.machine)?;
    let rebuilt = pam(guest)?;
    scenario.fact("after a rebuild", rebuilt.join(" "));
    scenario.check(
        rebuilt != shadowed,
        "a rebuild shows the ROM where the firmware's copy was",
    )?;
    guest.machine.qmp.execute("cont", json!({}))?;
    as_at_first(scenario, guest)?;

    rebuild(guest, false)?;
    guest.machine.qmp.execute("stop", json!({}))?;
    reset(&mut guest.machine)?;
    let plain = pam(guest)?;
    scenario.fact("after a plain reset", plain.join(" "));
    scenario.check_equal(plain, shadowed, "PAM registers after a plain reset")?;
    guest.machine.qmp.execute("cont", json!({}))?;
    as_at_first(scenario, guest)?;
    rebuild(guest, true).map(|_| ())
}

/// Rebuilt while it stands still, and by two requests one after the other.
fn stopped(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    guest.machine.qmp.execute("stop", json!({}))?;
    reset(&mut guest.machine)?;
    scenario.check_equal(
        status(&mut guest.machine)?,
        "prelaunch".into(),
        "the VM's state",
    )?;
    for _ in 0..2 {
        guest.machine.qmp.execute("system_reset", json!({}))?;
    }
    reset(&mut guest.machine)?;
    guest.machine.qmp.execute("cont", json!({}))?;
    as_at_first(scenario, guest)
}

/// The kernel has no memory for the slot of a module: the VM stops, says which, and goes on when there is some.
fn no_slot(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let pid = guest.machine.pid();
    guest.machine.qmp.execute(
        "object-add",
        json!({"qom-type": "memory-backend-gmem", "id": "mem1", "size": DIMM_BYTES}),
    )?;
    {
        let faults = Faults::under("kvm_vm_ioctl")?;
        faults.fail_all(&[pid], true)?;
        let plugged = guest.machine.qmp.execute(
            "device_add",
            json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "mem1"}),
        );
        faults.fail_all(&[pid], false)?;
        plugged?;
    }
    let deadline = Instant::now() + PATIENCE;
    while status(&mut guest.machine)? != "paused" {
        scenario.check(
            Instant::now() < deadline,
            "a VM stops whose memory has no slot",
        )?;
    }
    let complaints = guest.machine.complaints();
    let said = complaints
        .lines()
        .find(|line| line.contains("'mem1'") && line.contains("cannot do without"))
        .attempt(|| format!("QEMU does not name the memory without a slot: {complaints}"))?;
    scenario.fact("said", said);
    guest.machine.qmp.execute("cont", json!({}))?;
    scenario.check_equal(
        status(&mut guest.machine)?,
        "running".into(),
        "the VM's state",
    )?;

    let arguments = json!({"path": "/machine/peripheral/dimm0", "property": "addr"});
    let address: Value = guest.machine.qmp.execute("qom-get", arguments)?;
    let gpa = address
        .as_u64()
        .attempt(|| format!("the module's address is no number: {address}"))?;
    guest.ledger.plug(Block::small("mem1", DIMM_BYTES), gpa);
    guest.reopen()?;
    guest.fill(gpa, DIMM_BYTES, 11)?;
    guest.convert(scenario, gpa + MIB, MIB, true)?;
    guest.fill(gpa + MIB, MIB, 12)?;
    Engine::new(0, ORIGIN).reaches(scenario, guest, gpa + 4 * MIB)?;
    guest.agree(scenario, "with memory whose slot came late")
}

/// What the kernel has no slot for before the guest runs is said, and ends QEMU.
fn no_slot_at_start(scenario: &mut Scenario) -> Outcome {
    // What is to fail is inherited by what is started.
    let faults = Faults::under("kvm_set_memslot")?;
    let here = std::process::id();
    faults.fail_all(&[here], true)?;
    let refusal = Machine::refusal(
        &scenario.directory().join("start"),
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}"),
            "-m",
            &format!("{}M", RAM_BYTES / MIB),
            "-machine",
            "q35,accel=kvm,memory-backend=ram0",
        ],
    );
    faults.fail_all(&[here], false)?;
    let refusal = refusal?;
    scenario.fact("said", refusal.as_str());
    scenario.check(
        refusal.contains("'ram0'") && refusal.contains("cannot start"),
        format!("QEMU names the memory without a slot: {refusal}"),
    )
}

/// The module is still there, and its memory is new; what is being unplugged, too, when the guest has not answered.
fn with_a_module(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    reset(&mut guest.machine)?;
    as_at_first(scenario, guest)?;
    guest
        .machine
        .qmp
        .execute("device_del", json!({"id": "dimm0"}))?;
    reset(&mut guest.machine)?;
    as_at_first(scenario, guest)
}

/// The kernel has no memory for a new VM, at each point in turn: the old one has lost nothing.
fn no_new_vm(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let pid = guest.machine.pid();
    guest.convert(scenario, PRIVATE, PRIVATE_BYTES, true)?;
    guest.fill(PRIVATE, PRIVATE_BYTES, 21)?;
    let faults = Faults::under("kvm_dev_ioctl")?;
    let mut failed = 0;
    // The first few, and then ever fewer: there are some hundred.
    for number in [1, 2, 3, 5, 8, 13, 21, 34, 55] {
        faults.fail_nth(pid, number)?;
        let done = reset(&mut guest.machine);
        let hit = faults.failed(pid)?;
        done.attempt(|| format!("with allocation {number} of a new VM failed"))?;
        if !hit {
            guest.monitor.wait_until_ready()?;
            break;
        }
        if status(&mut guest.machine)? == "running" {
            // The kernel can do without this one.
            guest.monitor.wait_until_ready()?;
            continue;
        }
        failed += 1;
        scenario.check_equal(
            status(&mut guest.machine)?,
            "internal-error".into(),
            "the VM's state",
        )?;
        let cont = guest.machine.qmp.try_execute("cont", json!({}))?;
        scenario.check(cont.is_err(), "what could not be rebuilt does not run")?;
        monitor_works(scenario, guest, false)?;
        reset(&mut guest.machine)?;
        guest.machine.qmp.execute("cont", json!({}))?;
        guest.monitor.wait_until_ready()?;
    }
    drop(faults);
    scenario.fact("failed", failed);
    scenario.check(failed > 0, "a new VM can fail for want of memory")?;
    reset(&mut guest.machine)?;
    as_at_first(scenario, guest)
}

/// Memory can be read, and is zeros if it was lost; what would need it is refused.
fn monitor_works(scenario: &Scenario, guest: &mut Confidential, lost: bool) -> Outcome {
    let seen = hmp(guest, &format!("xp /2gx {ORIGIN:#x}"))?;
    scenario.check(seen.contains("0x"), format!("xp reads memory: {seen}"))?;
    hmp(guest, "info registers")?;
    hmp(guest, "info mtree -f")?;
    guest.machine.qmp.execute("query-cpus-fast", json!({}))?;
    if lost {
        let dump = json!({"paging": false, "protocol": "file:/run/lab/dump"});
        let dumped = guest.machine.qmp.try_execute("dump-guest-memory", dump)?;
        let refusal = dumped.err().map(|refusal| refusal.description);
        scenario.check(
            refusal.as_ref().is_some_and(|text| text.contains("lost")),
            format!("a dump of memory that is lost is refused: {refusal:?}"),
        )?;
    }
    Ok(())
}
