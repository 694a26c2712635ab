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
use std::collections::BTreeSet;
use std::fs;
use std::time::Instant;

const RAM_BYTES: u64 = 64 * MIB;
const DIMM_BYTES: u64 = 32 * MIB;
const PRIVATE_BYTES: u64 = 4 * MIB;
/// Where QEMU itself writes at each reset.
const LOADED: u64 = 40 * MIB;
const REBUILDS: usize = 20;
/// What allocators keep and pools grow by, not one reset handler or image.
const HEAP_SLACK_BYTES: u64 = MIB;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    scenario.prefix("many with an image: ");
    many_with_an_image(scenario)?;

    scenario.prefix("no slot at start: ");
    no_slot_at_start(scenario)?;

    let device = to_vfio(&EDU)?;
    let loader = format!("loader,addr={LOADED:#x},data=0,data-len=8");
    // The firmware starts the disk, and nobody stops it: its ioeventfds are there at each reset.
    let more = [
        "-m",
        "slots=2,maxmem=1G",
        "-device",
        &loader,
        "-blockdev",
        "null-co,node-name=null0,size=1048576",
        "-device",
        "virtio-blk-pci,drive=null0",
    ];
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
    scenario.prefix("no file descriptor: ");
    no_descriptors(scenario, &mut guest)?;
    scenario.prefix("no memory for a step: ");
    steps_that_fail(scenario, &mut guest)?;
    if !guest.in_place {
        scenario.prefix("a reset that fails: ");
        reset_that_fails(scenario, &mut guest)?;
    }
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
        guest
            .machine
            .qmp
            .human(&format!("o/w 0xcf8 {:#x}", 0x8000_0000u32 + offset))?;
        let answer = guest.machine.qmp.human("i/w 0xcfc")?;
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
        // Not all that KVM does: a bus that it has no memory to shrink is gone for good.
        let faults = Faults::under("kvm_set_memslot")?;
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

/// A number that QEMU's files do not have: the lowest, or one after that.
fn free_number(pid: u32, after: usize) -> Result<u64, Failure> {
    let path = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&path).attempt(|| format!("reading {path}"))?;
    let held: BTreeSet<u64> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    (0..)
        .filter(|number| !held.contains(number))
        .nth(after)
        .attempt(|| "numbers end".into())
}

fn limit_descriptors(pid: u32, limit: u64) -> Outcome {
    let limit = libc::rlimit {
        rlim_cur: limit,
        rlim_max: 4096,
    };
    // SAFETY: the structure outlives the call; no old limits are asked for.
    let result = unsafe {
        libc::prlimit(
            pid as libc::pid_t,
            libc::RLIMIT_NOFILE,
            &limit,
            std::ptr::null_mut(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).attempt(|| "limiting QEMU's files".into()),
    }
}

/// A VM that stands still was to be rebuilt and could not be: QEMU says why, and does not run it. What it said.
fn is_refused(
    scenario: &Scenario,
    guest: &mut Confidential,
    heard: usize,
) -> Result<String, Failure> {
    scenario.check_equal(
        status(&mut guest.machine)?,
        "internal-error".into(),
        "the VM's state",
    )?;
    let said = guest.machine.complaints().split_off(heard);
    scenario.check(
        said.contains("unable to rebuild guest"),
        format!("QEMU says that it could not rebuild the VM: {said}"),
    )?;
    let cont = guest.machine.qmp.try_execute("cont", json!({}))?;
    scenario.check(
        cont.is_err(),
        format!("what could not be rebuilt does not run: {said}"),
    )?;
    monitor_works(scenario, guest, said.contains("memory is lost"))?;
    Ok(said)
}

/// Rebuilds a VM that stands still with no file descriptor to spare, with one, with two, until it succeeds; after each that
/// failed once more, with enough of them. The memory is a file's then, also where zeros stood in for it in between.
fn no_descriptors(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    const MOST: usize = 40;
    const POLLED: u64 = 64;
    let pid = guest.machine.pid();
    // A process can't poll more files than it may have, so that the limit must not be below what QEMU polls.
    for filler in 0.. {
        if free_number(pid, 0)? >= POLLED {
            break;
        }
        let node = json!({
            "driver": "file",
            "node-name": format!("filler{filler}"),
            "filename": crate::place::payload(),
            "read-only": true,
        });
        guest.machine.qmp.execute("blockdev-add", node)?;
    }
    guest.machine.qmp.execute("stop", json!({}))?;
    let mut failed = Vec::new();
    let mut lost = 0;
    for spare in 0..MOST {
        let limit = free_number(pid, spare)?;
        let heard = guest.machine.complaints().len();
        limit_descriptors(pid, limit)?;
        let done = reset(&mut guest.machine);
        limit_descriptors(pid, 1024)?;
        done.attempt(|| format!("with {spare} file descriptors to spare"))?;
        if status(&mut guest.machine)? == "prelaunch" {
            scenario.fact("file descriptors that a rebuild needs", spare);
            break;
        }
        scenario.check(spare + 1 < MOST, "a rebuild succeeds with enough to spare")?;
        let said = is_refused(scenario, guest, heard)?;
        let reason = said
            .lines()
            .find(|line| line.contains("Too many open files"))
            .attempt(|| format!("QEMU does not say why it could not rebuild the VM: {said}"))?;
        failed.push(reason.to_string());
        let was_lost = said.contains("memory is lost");
        lost += u64::from(was_lost);

        // Now there is room again: the same request brings the guest back.
        reset(&mut guest.machine)?;
        scenario.check_equal(
            status(&mut guest.machine)?,
            "prelaunch".into(),
            "the VM's state",
        )?;
        if was_lost && lost == 1 {
            guest.machine.qmp.execute("cont", json!({}))?;
            as_at_first(scenario, guest)?;
            guest.machine.qmp.execute("stop", json!({}))?;
        }
    }
    failed.dedup();
    scenario.fact("reasons for which a rebuild failed", failed.clone());
    scenario.fact("of these after the old memory was gone", lost);
    scenario.check(
        !failed.is_empty(),
        "a rebuild fails without file descriptors",
    )?;
    scenario.check(lost > 0, "one fails after the old memory was gone")?;
    guest.machine.qmp.execute("cont", json!({}))?;
    as_at_first(scenario, guest)
}

/// The kernel has no memory for one step after the other, when the old VM is gone already. The next reset makes up for it.
fn steps_that_fail(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    /// What the kernel does, and which of the allocations in it fail, each in a rebuild of its own until one does not succeed.
    /// No number: all of them in one.
    const STEPS: [(&str, std::ops::Range<u32>); 8] = [
        // The first ones are for those of the old VM. It has some while it runs: not when it stands still.
        ("kvm_ioeventfd", 2..9),
        ("kvm_pic_init", 1..2),
        ("kvm_ioapic_init", 1..2),
        ("kvm_create_pit", 1..2),
        ("kvm_arch_vcpu_create", 1..2),
        // The first table is that of a new interrupt controller, the second one QEMU's.
        ("kvm_set_irq_routing", 1..2),
        ("kvm_set_irq_routing", 60..61),
        ("kvm_set_memslot", 0..0),
    ];
    let pid = guest.machine.pid();
    let rebuild = |guest: &mut Confidential, on: bool| {
        let arguments =
            json!({"path": "/machine", "property": "x-change-vmfd-on-reset", "value": on});
        guest.machine.qmp.execute("qom-set", arguments)
    };
    let mut reasons = Vec::new();
    for (function, numbers) in STEPS {
        let mut heard = guest.machine.complaints().len();
        if numbers.is_empty() {
            let faults = Faults::under(function)?;
            faults.fail_all(&[pid], true)?;
            let done = reset(&mut guest.machine);
            faults.fail_all(&[pid], false)?;
            done.attempt(|| format!("without memory in {function}"))?;
        }
        for number in numbers {
            heard = guest.machine.complaints().len();
            let faults = Faults::under(function)?;
            faults.fail_nth(pid, number)?;
            let done = reset(&mut guest.machine);
            let hit = faults.failed(pid)?;
            drop(faults);
            done.attempt(|| format!("with allocation {number} in {function} failed"))?;
            scenario.check(
                hit,
                format!("a rebuild has {number} allocations in {function}"),
            )?;
            match status(&mut guest.machine)?.as_str() {
                "running" => guest.monitor.wait_until_ready()?,
                _ => break,
            }
        }
        let said = is_refused(scenario, guest, heard)
            .attempt(|| format!("without memory in {function}"))?;
        let reason = said.lines().find(|line| line.contains("Cannot allocate"));
        reasons.push(format!("{function}: {}", reason.unwrap_or(&said)));

        // It is to be rebuilt, whatever else was asked for meanwhile.
        rebuild(guest, false)?;
        reset(&mut guest.machine)?;
        scenario.check_equal(
            status(&mut guest.machine)?,
            "prelaunch".into(),
            format!("the VM's state after {function} had failed once"),
        )?;
        rebuild(guest, true)?;
    }
    scenario.fact("steps that failed", reasons);
    guest.machine.qmp.execute("cont", json!({}))?;
    as_at_first(scenario, guest)
}

/// A device can't have the guest's pages, which therefore stay private: what QEMU writes there at each reset has no place. At the
/// start that would be the end; a VM that was reset while it stood still is in the same state as one at the start, and is none.
fn reset_that_fails(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let pid = guest.machine.pid();
    let arguments =
        json!({"path": "/machine", "property": "x-change-vmfd-on-reset", "value": false});
    guest.machine.qmp.execute("qom-set", arguments)?;
    guest.convert(scenario, LOADED, MIB, true)?;
    guest.machine.qmp.execute("stop", json!({}))?;
    let heard = guest.machine.complaints().len();
    let faults = Faults::under("iommufd_fops_ioctl")?;
    faults.fail_all(&[pid], true)?;
    let done = reset(&mut guest.machine).and_then(|()| reset(&mut guest.machine));
    faults.fail_all(&[pid], false)?;
    drop(faults);
    done.attempt(|| "resets of a VM that stands still".into())?;
    let said = guest.machine.complaints().split_off(heard);
    let refusal = said
        .lines()
        .find(|line| line.starts_with("qemu-system-x86_64: loader: "))
        .attempt(|| format!("QEMU says what it could not load: {said}"))?;
    scenario.fact("said", refusal);
    reset(&mut guest.machine)?;
    guest.machine.qmp.execute("cont", json!({}))?;
    as_at_first(scenario, guest)
}

/// Memory can be read, and is zeros if it was lost; what would need it is refused.
fn monitor_works(scenario: &Scenario, guest: &mut Confidential, lost: bool) -> Outcome {
    let seen = guest.machine.qmp.human(&format!("xp /2gx {ORIGIN:#x}"))?;
    scenario.check(seen.contains("0x"), format!("xp reads memory: {seen}"))?;
    guest.machine.qmp.human("info registers")?;
    guest.machine.qmp.human("info mtree -f")?;
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
