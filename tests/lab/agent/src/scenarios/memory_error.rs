// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page of the machine breaks under a guest: whoever reads it gets a machine check that says where, and the guest goes
//! on. No device gets the page, it converts no more, and a reset replaces it. A huge page of shared memory takes no private
//! page along. In an ordinary guest, what a device could not be given again beside the page is its again after a reset.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Failure;
use crate::host::huge_pages::Pool;
use crate::host::kernel;
use crate::host::memory_errors::{inject, repair, Watch};
use crate::host::messages::Messages;
use crate::host::passthrough::{to_vfio, EDU};
use crate::ledger::{Block, Ledger, PAGE};
use crate::machine::{Machine, Surroundings};
use crate::monitor::{MachineCheck, Monitor, Touched};
use crate::qmp::Gmem;
use crate::rebuilt::reset;
use crate::scenario::{Outcome, Scenario};
use crate::vmcore::Core;
use serde_json::{json, Value};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
const ORIGIN: u64 = 16 * MIB;
/// Eight pages around each broken one.
const PAGES: u64 = 8;
const BROKEN: u64 = 3;
const PRIVATE: u64 = 32 * MIB;
const SHARED: u64 = 40 * MIB;
const EINVAL: i64 = libc::EINVAL as i64;
const FAULT_PATIENCE: Duration = Duration::from_secs(30);
const EXIT_PATIENCE: Duration = Duration::from_secs(120);
/// An uncorrected error that is valid, with an address.
const STATUS: u64 = 1 << 63 | 1 << 61 | 1 << 58;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let mut guest =
        Confidential::with_one_device(scenario.directory(), RAM_BYTES, Surroundings::default())?;
    let mut broken = Vec::new();
    for (private, place) in [(false, SHARED), (true, PRIVATE)] {
        let kind = if private { "private" } else { "shared" };
        scenario.prefix(&format!("{kind} page: "));
        broken.push(breaks(scenario, &mut guest, place, private)?);
        let poisoned = number(&mut guest, "poisoned")?;
        scenario.check_equal(
            poisoned,
            broken.len() as u64 * PAGE,
            "query-gmem's poisoned",
        )?;
        scenario.fact("query-gmem's poisoned", poisoned);
    }
    scenario.prefix("");
    not_in_a_dump(scenario, &mut guest)?;
    replaced_by_a_reset(scenario, &mut guest)?;
    guest.finish(scenario)?;
    for page in broken {
        repair(page);
    }
    if !kernel::in_place() {
        scenario.prefix("huge page: ");
        huge_page(scenario)?;
    }
    scenario.prefix("ordinary guest: ");
    ordinary(scenario, &to_vfio(&EDU)?)?;
    scenario.prefix("");
    Ok(())
}

/// A page of an ordinary guest breaks while QEMU may lock no memory: what was mapped together with it can't be given back to the
/// device, not even by the reset that replaces the page. The next one can, although no more pages broke. The VM stands still
/// meanwhile, since a firmware that moves RAM about would have the device's windows looked at, too.
fn ordinary(scenario: &mut Scenario, device: &str) -> Outcome {
    let victim = SHARED + BROKEN * PAGE;
    let object = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}");
    let size = format!("{}M", RAM_BYTES / MIB);
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    let mut arguments = vec![
        "-object",
        &object,
        "-m",
        &size,
        "-kernel",
        crate::place::payload(),
    ];
    arguments.extend(["-machine", "q35,accel=kvm,memory-backend=ram0"]);
    arguments.extend(["-object", "iommufd,id=iommufd0", "-device", &passthrough]);
    let surroundings = Surroundings {
        limited: true,
        ..Surroundings::default()
    };
    let directory = scenario.directory().join("ordinary");
    let (mut machine, serial) = Machine::start_in(&directory, &arguments, surroundings)?;
    let mut monitor = Monitor::new(serial)?;
    let of_block = |machine: &mut Machine, name: &str| -> Result<u64, Failure> {
        Gmem::query(&mut machine.qmp)?.block("ram0")?.number(name)
    };
    let mapped = of_block(&mut machine, "dma-mapped")?;

    let watch = Watch::on(victim)?;
    monitor.fill(victim, PAGE, 1)?;
    let page = watch.page()?;
    drop(watch);
    machine.limit_locked(0)?;
    // The kernel may take it late; whether it did shows in the machine check.
    let _ = inject(page);
    let Touched::MachineCheck(_) = monitor.touch(victim + 64)? else {
        return Err(Failure::new(format!(
            "does not hold: reading the broken page {victim:#x} is a machine check"
        )));
    };
    let lost = of_block(&mut machine, "quarantined")?;
    scenario.fact("bytes lost to the device beside the page", lost);
    scenario.check(
        lost > PAGE,
        format!("a device is without what was mapped together with the page: {lost} bytes"),
    )?;
    scenario.check_equal(
        of_block(&mut machine, "poisoned")?,
        PAGE,
        "query-gmem's poisoned",
    )?;

    machine.qmp.execute("stop", json!({}))?;
    reset(&mut machine)?;
    let (poisoned, quarantined) = (
        of_block(&mut machine, "poisoned")?,
        of_block(&mut machine, "quarantined")?,
    );
    scenario.check_equal(poisoned, 0, "query-gmem's poisoned after a reset")?;
    scenario.check(
        quarantined >= lost,
        format!("the device can't have it as long as nothing may be locked: {quarantined} bytes"),
    )?;

    // VFIO has something to say of each reset of this device.
    let said = |machine: &Machine| -> Vec<String> {
        let complaints = machine.complaints();
        let ours = complaints.lines().filter(|line| line.contains("gmem"));
        ours.map(String::from).collect()
    };
    reset(&mut machine)?;
    let mut warnings = said(&machine);
    warnings.retain(|line| line.contains("of guest memory are quarantined"));
    scenario.check(
        warnings.len() == 1 && warnings[0].contains(&format!("{quarantined} bytes")),
        format!("QEMU says once what devices lack after resets: {warnings:?}"),
    )?;
    scenario.fact("what devices lack after a reset", warnings[0].as_str());

    machine.limit_locked(libc::RLIM_INFINITY)?;
    let before = said(&machine);
    reset(&mut machine)?;
    for (name, expected) in [("quarantined", 0), ("dma-mapped", mapped)] {
        let number = of_block(&mut machine, name)?;
        scenario.check_equal(
            number,
            expected,
            format!("query-gmem's {name} after a reset when memory may be locked"),
        )?;
    }
    reset(&mut machine)?;
    let since: Vec<String> = said(&machine).split_off(before.len());
    scenario.check(
        since.len() == 1 && since[0].contains("devices have all of the guest memory"),
        format!("QEMU says once that devices lack nothing any more: {since:?}"),
    )?;
    machine.qmp.execute("cont", json!({}))?;
    monitor.wait_until_ready()?;
    for target in [victim, victim + PAGE, ORIGIN + 2 * PAGE] {
        monitor.fill(ORIGIN, PAGE, 2)?;
        monitor.zero(target, PAGE)?;
        monitor.edu_load(ORIGIN)?;
        monitor.edu_store(target)?;
        let difference = monitor.check_copy(target, PAGE, 2, ORIGIN)?;
        scenario.check_equal(
            difference,
            None,
            format!("the device reaches {target:#x} after the resets"),
        )?;
    }
    scenario.fact("after a reset", "the device reaches all of it");
    monitor.power_off()?;
    machine.wait_for_exit(EXIT_PATIENCE)?;
    repair(page);
    Ok(())
}

/// Of the shared plane a huge page is lost. The private pages in its range, which are in another file, stay the guest's.
fn huge_page(scenario: &mut Scenario) -> Outcome {
    const HUGE: u64 = 2 * MIB;
    const BYTES: u64 = 64 * MIB;
    const PLACE: u64 = 32 * MIB;
    const KEPT: u64 = PLACE + 8 * PAGE;
    const KEPT_BYTES: u64 = 4 * PAGE;
    let victim = PLACE + BROKEN * PAGE;
    let pool = Pool::of(HUGE)?;
    // One to replace what is lost.
    pool.resize(BYTES / HUGE + 1)?;
    let object = format!("memory-backend-gmem,id=ram0,size={BYTES},hugetlb=on,hugetlbsize=2M");
    let mut guest = Confidential::start(
        scenario.directory(),
        &[
            "-object",
            &object,
            "-m",
            &format!("{}M", BYTES / MIB),
            "-machine",
            "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0",
        ],
        Ledger::new(vec![Block::huge("ram0", BYTES, HUGE)]),
    )?;
    guest.convert(scenario, KEPT, KEPT_BYTES, true)?;
    guest.fill(KEPT, KEPT_BYTES, 1)?;
    let watch = Watch::on(victim)?;
    guest.fill(victim, PAGE, 2)?;
    let page = watch.page()?;
    drop(watch);
    inject(page)?;
    guest.ledger.forget(victim, PAGE);
    let check = machine_check(scenario, &mut guest, victim)?;
    scenario.fact("read", described(&check));
    let poisoned = number(&mut guest, "poisoned")?;
    scenario.fact("query-gmem's poisoned", poisoned);
    scenario.check_equal(poisoned, HUGE, "query-gmem's poisoned")?;

    guest.agree_but_kernel(scenario, "a huge page is lost")?;
    guest.fill(KEPT, KEPT_BYTES, 3)?;
    guest.convert(scenario, KEPT, KEPT_BYTES, true)?;
    guest.agree_but_kernel(scenario, "private pages beside it written")?;
    for (gpa, private) in [(KEPT, false), (victim, true), (PLACE, true)] {
        let result = guest.monitor.convert(gpa, PAGE, private)?;
        scenario.check_equal(result, EINVAL, format!("result of converting {gpa:#x}"))?;
    }
    scenario.fact("private pages in its range", "usable, and stay private");

    guest.machine.qmp.execute("system_reset", json!({}))?;
    guest.monitor.wait_until_ready()?;
    guest.ledger.reset();
    let poisoned = number(&mut guest, "poisoned")?;
    scenario.check_equal(poisoned, 0, "query-gmem's poisoned after a reset")?;
    guest.fill(PLACE, PAGES * PAGE, 4)?;
    guest.convert(scenario, PLACE, PAGES * PAGE, true)?;
    guest.fill(PLACE, PAGES * PAGE, 5)?;
    guest.agree_but_kernel(scenario, "after a reset")?;
    guest.finish(scenario)?;
    repair(page);
    // What was lost may not have come back to it.
    let _ = pool.resize(0);
    Ok(())
}

fn number(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .number(name)
}

/// Nobody can read them, and who tries it in a mapping dies.
fn not_in_a_dump(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let path = std::env::temp_dir().join("vmcore");
    let protocol = format!("file:{}", path.display());
    guest.machine.qmp.execute(
        "dump-guest-memory",
        json!({"paging": false, "protocol": protocol}),
    )?;
    let core = Core::elf(&path)?;
    for place in [SHARED, PRIVATE] {
        let victim = place + BROKEN * PAGE;
        scenario.check(
            core.at(victim, PAGE).is_none(),
            format!("the broken page at {victim:#x} is not in a dump"),
        )?;
    }
    let around = [PRIVATE, PRIVATE + (BROKEN + 1) * PAGE];
    for gpa in around {
        scenario.check(
            core.at(gpa, PAGE).is_some(),
            format!("the shared page at {gpa:#x}, beside a broken one, is in a dump"),
        )?;
    }
    scenario.fact("a dump", "has all but the broken pages");
    Ok(())
}

/// A page breaks; the machine's number of it.
fn breaks(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    place: u64,
    private: bool,
) -> Result<u64, Failure> {
    const BYTES: u64 = PAGES * PAGE;
    let victim = place + BROKEN * PAGE;
    // Also where they end up shared: whatever converts is mapped anew when it is touched, which is seen.
    guest.convert(scenario, place, BYTES, true)?;
    if !private {
        guest.convert(scenario, place, BYTES, false)?;
    }
    let watch = Watch::on(victim)?;
    guest.fill(place, BYTES, 1)?;
    let page = watch.page()?;
    drop(watch);
    let mut messages = Messages::from_now()?;
    let injected = inject(page);
    scenario.fact(
        "the kernel takes it",
        injected.map_or_else(|failure| failure.to_string(), |()| "at once".into()),
    );
    let said = messages.find(&["Memory failure", &format!("{page:#x}")], FAULT_PATIENCE)?;
    scenario.fact("the kernel says", said.unwrap_or_default());
    // What it held is lost, and reading it outside of `touch` would be the guest's end.
    guest.ledger.forget(victim, PAGE);

    for attempt in ["first", "second"] {
        let check = machine_check(scenario, guest, victim)?;
        scenario.fact(&format!("{attempt} read"), described(&check));
    }
    let status = guest.machine.qmp.execute("query-status", json!({}))?;
    scenario.check_equal(
        status["status"].as_str(),
        Some("running"),
        "the VM's status",
    )?;
    guest.agree_but_kernel(scenario, "broken")?;

    let (gpa, bytes) = (place, BYTES);
    for (what, gpa, bytes) in [("it", victim, PAGE), ("a range with it", gpa, bytes)] {
        let result = guest.monitor.convert(gpa, bytes, !private)?;
        scenario.fact(&format!("converting {what}"), result);
        scenario.check_equal(result, EINVAL, format!("result of converting {what}"))?;
    }
    for (gpa, bytes) in [
        (place, BROKEN * PAGE),
        (victim + PAGE, (PAGES - BROKEN - 1) * PAGE),
    ] {
        guest.convert(scenario, gpa, bytes, !private)?;
        guest.fill(gpa, bytes, 2)?;
    }
    guest.agree_but_kernel(scenario, "pages beside it converted")?;
    kept_from_the_device(scenario, guest, victim)?;
    Ok(page)
}

/// A read of the page is a machine check that says where.
fn machine_check(
    scenario: &Scenario,
    guest: &mut Confidential,
    victim: u64,
) -> Result<MachineCheck, Failure> {
    let touched = guest.monitor.touch(victim + 64)?;
    let Touched::MachineCheck(check) = touched else {
        return Err(Failure::new(format!(
            "does not hold: reading the broken page {victim:#x} is a machine check"
        )));
    };
    scenario.check(
        check.status & STATUS == STATUS && check.address & !(PAGE - 1) == victim,
        format!("the machine check says that {victim:#x} is broken: {check:x?}"),
    )?;
    Ok(check)
}

fn described(check: &MachineCheck) -> Value {
    json!({
        "bank": check.bank, "status": format!("{:#x}", check.status),
        "address": format!("{:#x}", check.address), "global": format!("{:#x}", check.global),
    })
}

/// What the device writes there goes nowhere, and the IOMMU says so.
fn kept_from_the_device(scenario: &mut Scenario, guest: &mut Confidential, victim: u64) -> Outcome {
    let mut messages = Messages::from_now()?;
    guest.fill(ORIGIN, PAGE, 3)?;
    guest.monitor.edu_load(ORIGIN)?;
    guest.monitor.edu_store(victim)?;
    let address = format!("{victim:#x}");
    let mut fault = messages.find(&["DMAR", &address], FAULT_PATIENCE)?;
    if fault.is_none() {
        // Linux prints ten of these in five seconds, and other scenarios have theirs.
        std::thread::sleep(std::time::Duration::from_secs(5));
        guest.monitor.edu_store(victim)?;
        fault = messages.find(&["DMAR", &address], FAULT_PATIENCE)?;
    }
    scenario.check(
        fault.is_some(),
        format!("the IOMMU reports a fault at the broken page {address}"),
    )?;
    scenario.fact("DMA to it", fault);
    Ok(())
}

/// A reset of the VM gives the guest other pages in place of the broken ones.
fn replaced_by_a_reset(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    guest.machine.qmp.execute("system_reset", json!({}))?;
    guest.monitor.wait_until_ready()?;
    guest.ledger.reset();
    let poisoned = number(guest, "poisoned")?;
    scenario.fact("query-gmem's poisoned after a reset", poisoned);
    scenario.check_equal(poisoned, 0, "query-gmem's poisoned after a reset")?;
    for place in [PRIVATE, SHARED] {
        guest.fill(place, PAGES * PAGE, 4)?;
        let victim = place + BROKEN * PAGE;
        guest.monitor.edu_load(ORIGIN)?;
        guest.monitor.edu_store(victim)?;
        guest.fill(victim, PAGE, 4)?;
        guest.convert(scenario, place, PAGES * PAGE, true)?;
        guest.fill(place, PAGES * PAGE, 5)?;
    }
    guest.agree_but_kernel(scenario, "after a reset")?;
    scenario.fact("pages after a reset", "usable, shared and private");
    Ok(())
}
