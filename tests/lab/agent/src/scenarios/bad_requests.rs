// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests that make no sense, from the guest and by QMP: each gets an error, or is ignored where that is documented;
//! the guest goes on and QEMU does not grow.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Failure;
use crate::host::memory::anonymous_resident;
use crate::ledger::PAGE;
use crate::monitor::protocol::MAP_GPA_ENCRYPTED;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use crate::virtio::{Answer, Buffer, Device, RINGS_BYTES, RNG};
use serde_json::{json, Value};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 256 * MIB;
const MAX_RUNS: u64 = 256;
const STORM: u64 = 100_000;
const MMIO: u64 = 0xfed0_0000;
const EVENT: &str = "GMEM_CONVERSION_FAILED";
const EVENT_PATIENCE: Duration = Duration::from_secs(30);
const DEVICE_PATIENCE: Duration = Duration::from_secs(3);
/// What QEMU may grow by meanwhile: its allocator's slack, not something per request.
const GROWTH_BYTES: u64 = 8 * MIB;

/// The largest request that is carried out.
const MAX_REQUEST: u64 = 16 * MIB;

const EINVAL: i64 = libc::EINVAL as i64;
const EAGAIN: i64 = libc::EAGAIN as i64;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let mut guest = Confidential::with_one_block(
        scenario.directory(),
        RAM_BYTES,
        &format!(",max-runs={MAX_RUNS},max-request={MAX_REQUEST}"),
        &["-device", "virtio-rng-pci"],
    )?;
    guest.fill(16 * MIB, MIB, 1)?;
    guest.agree(scenario, "before")?;

    refused(scenario, &mut guest)?;
    refused_by_kvm(scenario, &mut guest)?;
    ignored(scenario, &mut guest)?;
    too_large(scenario, &mut guest)?;
    storm(scenario, &mut guest)?;
    too_many_runs(scenario, &mut guest)?;
    queue_in_private_page(scenario, &mut guest)?;
    commands(scenario, &mut guest)?;

    guest.convert(scenario, 32 * MIB, 2 * MIB, true)?;
    guest.fill(32 * MIB, 2 * MIB, 9)?;
    guest.agree(scenario, "a good request after all the bad ones")?;
    guest.convert(scenario, 32 * MIB, 2 * MIB, false)?;
    guest.agree(scenario, "and back")?;
    guest.finish(scenario)
}

fn failures(guest: &mut Confidential) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?.total("failures")
}

/// To-private where there is no memory of ours. Nothing may have changed, also not the half that is memory.
fn refused(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let requests = [
        ("beyond RAM", 8 << 30, 512),
        ("MMIO", MMIO, 1),
        ("firmware", 0xffff_f000, 1),
        ("half in RAM", RAM_BYTES - MIB, 512),
        ("end of the address space", 0xffff_ffff_ffff_f000, 1),
        ("all of the address space", 0, (1 << 52) - 1),
    ];
    for (name, gpa, pages) in requests {
        let before = failures(guest)?;
        let result = guest.monitor.convert_raw(gpa, pages, MAP_GPA_ENCRYPTED)?;
        scenario.fact(&format!("to-private, {name}"), result);
        scenario.check_equal(result, EINVAL, format!("result of to-private, {name}"))?;
        scenario.check_equal(
            failures(guest)?,
            before + 1,
            format!("failures after {name}"),
        )?;
    }
    // QEMU itself refuses what it can't express in bytes, so that the library never counts it.
    let result = guest
        .monitor
        .convert_raw(16 * MIB, 1 << 53, MAP_GPA_ENCRYPTED)?;
    scenario.fact("to-private, more bytes than a number can hold", result);
    scenario.check_equal(
        result,
        EINVAL,
        "result of to-private, more bytes than a number can hold",
    )?;
    guest.agree(scenario, "after refused requests")?;
    let event = guest.machine.qmp.event(EVENT, EVENT_PATIENCE)?;
    scenario.fact("event", event["data"].clone());
    scenario.check(
        event["data"]["to-private"] == Value::Bool(true)
            && event["data"]["error"]
                .as_str()
                .is_some_and(|text| !text.is_empty()),
        format!("the event says what was asked and why it failed: {event}"),
    )
}

/// Some never leave KVM on this VM type; recorded so that a kernel that changes its mind is noticed.
fn refused_by_kvm(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    for (name, gpa, pages) in [
        ("unaligned", 16 * MIB + 8, 1),
        ("empty", 16 * MIB, 0),
        ("wrapping", 16 * MIB, u64::MAX),
    ] {
        let result = guest.monitor.convert_raw(gpa, pages, MAP_GPA_ENCRYPTED)?;
        scenario.fact(&format!("to-private, {name}, refused by KVM"), result);
        scenario.check_equal(result, -EINVAL, format!("result of to-private, {name}"))?;
    }
    Ok(())
}

/// To-shared of what was never memory: nothing to do, so it succeeds and is counted.
fn ignored(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let ignored = |guest: &mut Confidential| -> Result<u64, Failure> {
        Gmem::query(&mut guest.machine.qmp)?.total("ignored-bytes")
    };
    let before = ignored(guest)?;
    let result = guest.monitor.convert(MMIO, PAGE, false)?;
    scenario.check_equal(result, 0, "result of to-shared, MMIO")?;
    let grown = ignored(guest)? - before;
    scenario.fact("to-shared of MMIO, ignored bytes", grown);
    scenario.check_equal(
        grown,
        PAGE,
        "ignored bytes after to-shared of one page of MMIO",
    )?;
    let result = guest.monitor.convert(RAM_BYTES - MIB, 2 * MIB, false)?;
    scenario.check_equal(result, 0, "result of to-shared, half in RAM")?;
    let grown = ignored(guest)? - before;
    scenario.check_equal(
        grown,
        PAGE + MIB,
        "ignored bytes after to-shared, half in RAM",
    )?;
    guest.agree(scenario, "after ignored requests")
}

/// What changes more than one request may is refused, counted, and named; as much as it may is not, and neither is what is as
/// wanted already.
fn too_large(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    const START: u64 = 64 * MIB;
    let refused = |guest: &mut Confidential| -> Result<u64, Failure> {
        Gmem::query(&mut guest.machine.qmp)?
            .block("ram0")?
            .number("requests-refused")
    };
    let before = (refused(guest)?, failures(guest)?);
    // Of requests that fail the log has one a second.
    std::thread::sleep(Duration::from_millis(1500));
    let result = guest.monitor.convert(START, MAX_REQUEST + PAGE, true)?;
    scenario.fact("to-private, a page more than max-request", result);
    scenario.check_equal(
        result,
        EINVAL,
        "result of to-private, a page more than max-request",
    )?;
    let after = (refused(guest)?, failures(guest)?);
    scenario.check_equal(
        after,
        (before.0 + 1, before.1 + 1),
        "query-gmem's requests-refused and failures",
    )?;
    scenario.check(
        guest.machine.complaints().contains("max-request"),
        "QEMU says that the request is larger than max-request",
    )?;
    guest.agree(scenario, "after a request that was too large")?;
    for private in [true, false] {
        guest.convert(scenario, START, MAX_REQUEST, private)?;
    }
    guest.convert(scenario, START, MAX_REQUEST + PAGE, false)?;
    scenario.check_equal(refused(guest)?, after.0, "requests-refused afterwards")
}

fn storm(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let pid = guest.machine.pid();
    let failed = failures(guest)?;
    let before = anonymous_resident(pid)?;
    let results = guest.monitor.storm(STORM, MMIO, PAGE, true, 0)?;
    let after = anonymous_resident(pid)?;
    scenario.fact("storm_results", results_fact(&results));
    scenario.fact("storm_qemu_bytes_before", before);
    scenario.fact("storm_qemu_bytes_after", after);
    let answered: u64 = results.iter().map(|(_, times)| times).sum();
    scenario.check_equal(answered, STORM, "requests that got an answer")?;
    scenario.check(
        results
            .iter()
            .all(|(value, _)| [0, EINVAL, EAGAIN].contains(value)),
        format!("each result is 0, EINVAL or EAGAIN: {results:?}"),
    )?;
    scenario.check_equal(failures(guest)? - failed, STORM, "failures counted by QEMU")?;
    scenario.check(
        after < before + GROWTH_BYTES,
        format!("QEMU did not grow in {STORM} bad requests: {before} bytes before, {after} after"),
    )?;
    scenario.fact("storm_events", guest.machine.qmp.events_waiting(EVENT));
    let complaints = guest.machine.complaints().len() as u64;
    scenario.fact("qemu_stderr_bytes", complaints);
    scenario.check(
        complaints < MIB,
        format!("QEMU's stderr does not grow with bad requests ({complaints} bytes)"),
    )?;
    scenario.progress(format!("{STORM} bad requests answered"));
    guest.agree(scenario, "after the storm")
}

fn results_fact(results: &[(i64, u64)]) -> Value {
    results
        .iter()
        .map(|(value, times)| (value.to_string(), json!(times)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// Every second page: the bound on runs holds, and what it refuses is refused for good reason and without harm.
fn too_many_runs(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    const START: u64 = 64 * MIB;
    const COUNT: u64 = 1000;
    let results = guest.monitor.storm(COUNT, START, PAGE, true, 2 * PAGE)?;
    scenario.fact("runs_results", results_fact(&results));
    let times = |value| {
        let found = results.iter().find(|(result, _)| *result == value);
        found.map_or(0, |(_, times)| *times)
    };
    let (done, refused) = (times(0), times(EINVAL));
    scenario.check(
        done > 0 && done <= MAX_RUNS && done + refused == COUNT,
        format!("of {COUNT} single pages at most {MAX_RUNS} became private: {results:?}"),
    )?;
    for index in 0..done {
        let at = START + 2 * index * PAGE;
        guest.ledger.convert(at, PAGE, true);
    }
    guest.fill(START, 2 * COUNT * PAGE, 2)?;
    guest.agree(scenario, "at the bound on runs")?;
    guest.convert(scenario, START, 2 * COUNT * PAGE, false)?;
    guest.agree(scenario, "runs gone again")
}

/// A device is pointed at memory that QEMU can't read; both go on.
fn queue_in_private_page(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    const RNG_BYTES: u64 = 64;
    const QUEUE: u64 = 96 * MIB;
    const BUFFER: u64 = 97 * MIB;
    let device = Device {
        kind: RNG,
        index: 0,
        queue: 0,
        rings: QUEUE,
    };
    let kick = |guest: &mut Confidential| -> Result<Answer, Failure> {
        let buffer = Buffer::written(BUFFER, RNG_BYTES);
        let offered = device.offer(&mut guest.monitor, &[buffer])?;
        device.answer(&mut guest.monitor, offered, DEVICE_PATIENCE)
    };
    device.start(&mut guest.monitor, 0)?;
    let answer = kick(guest)?;
    scenario.check(
        answer.written == Some(RNG_BYTES),
        format!("virtio-rng works with a shared queue: {answer:?}"),
    )?;

    guest.convert(scenario, QUEUE, RINGS_BYTES, true)?;
    guest.monitor.zero(QUEUE, RINGS_BYTES)?;
    let answer = kick(guest)?;
    scenario.fact(
        "virtio queue in a private page, device status",
        answer.status,
    );
    scenario.check(
        answer.written.is_none(),
        format!("a private queue is not served: {answer:?}"),
    )?;
    guest.monitor.ask("ping")?;
    let status = guest.machine.qmp.execute("query-status", json!({}))?;
    scenario.check_equal(
        status["status"].as_str(),
        Some("running"),
        "the VM's status after a kick of a private queue",
    )?;

    // What QEMU's own accesses allocated behind the private page is gone after the next conversion there.
    guest.convert(scenario, QUEUE, RINGS_BYTES, false)?;
    guest.agree(scenario, "queue shared again")?;
    device.start(&mut guest.monitor, 0)?;
    let answer = kick(guest)?;
    scenario.check(
        answer.written == Some(RNG_BYTES),
        format!("virtio-rng works again after a reset: {answer:?}"),
    )
}

/// Management asks for what our memory can't do.
fn commands(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let target = scenario.directory().join("migration.sock");
    for (name, command, arguments) in [
        (
            "calc-dirty-rate",
            "calc-dirty-rate",
            json!({"calc-time": 1}),
        ),
        (
            "calc-dirty-rate, dirty-bitmap",
            "calc-dirty-rate",
            json!({"calc-time": 1, "mode": "dirty-bitmap"}),
        ),
        (
            "set-vcpu-dirty-limit",
            "set-vcpu-dirty-limit",
            json!({"dirty-rate": 1}),
        ),
        (
            "migrate",
            "migrate",
            json!({"uri": format!("unix:{}", target.display())}),
        ),
    ] {
        match guest.machine.qmp.try_execute(command, arguments)? {
            Ok(answer) => {
                scenario.check(false, format!("{name} is refused (it answered {answer})"))?
            }
            Err(refusal) => scenario.fact(
                name,
                json!({"class": refusal.class, "desc": refusal.description}),
            ),
        }
        guest.monitor.ask("ping")?;
    }
    let status = guest.machine.qmp.execute("query-status", json!({}))?;
    scenario.check_equal(
        status["status"].as_str(),
        Some("running"),
        "the VM's status after refused commands",
    )
}
