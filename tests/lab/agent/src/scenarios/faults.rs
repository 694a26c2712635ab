// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory faults that a vCPU exits for. The host has no page: the vCPU waits, everything else goes on, and so does the vCPU
//! once there is one. Nobody can ever serve an access: the VM stops and says which and why. A fault that is the echo of
//! another vCPU's conversion means nothing, however long the vCPU is kept from its processor.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::{Attempt, Failure};
use crate::host::faults::Faults;
use crate::host::kernel;
use crate::host::memory::guest_memfds;
use crate::host::system_calls::in_the_name_of;
use crate::ledger::PAGE;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::Arc;
use std::thread::{sleep, spawn, JoinHandle};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
const PRIVATE: u64 = 32 * MIB;
const PRIVATE_BYTES: u64 = 64 * PAGE;
const FLIPPED: u64 = 64 * MIB;
const FLIPS: u64 = 200;
/// They last for many of the times that a throttled vCPU may not run.
const MANY_FLIPS: u64 = 3000;
/// Beyond all RAM.
const HOLE: u64 = 512 * MIB;
const PATIENCE: Duration = Duration::from_secs(120);
/// _IOW(KVMIO, 0xd2, struct kvm_memory_attributes)
const KVM_SET_MEMORY_ATTRIBUTES: u64 = 0x4020_aed2;
const KVM_MEMORY_ATTRIBUTE_PRIVATE: u64 = 1 << 3;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let mut guest = start(scenario)?;
    scenario.prefix("no page: ");
    no_page(scenario, &mut guest)?;
    scenario.prefix("echoes: ");
    echoes(scenario, &mut guest)?;
    if !guest.in_place {
        scenario.prefix("hole: ");
        hole(scenario, &mut guest)?;
    }
    scenario.prefix("");
    guest.finish(scenario)?;
    if !kernel::in_place() {
        scenario.prefix("no file: ");
        no_file(scenario)?;
        scenario.prefix("");
    }
    Ok(())
}

fn start(scenario: &Scenario) -> Result<Confidential, Failure> {
    Confidential::with_one_block(scenario.directory(), RAM_BYTES, "", &["-smp", "2"])
}

fn total(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?.total(name)
}

fn status(guest: &mut Confidential) -> Result<String, Failure> {
    let answer = guest.machine.qmp.execute("query-status", json!({}))?;
    Ok(answer["status"].as_str().unwrap_or_default().to_string())
}

/// Lines of QEMU's with all of these words.
fn said(guest: &Confidential, words: &[&str]) -> Vec<String> {
    let complaints = guest.machine.complaints();
    let lines = complaints.lines();
    lines
        .filter(|line| words.iter().all(|word| line.contains(word)))
        .map(String::from)
        .collect()
}

fn until(
    guest: &mut Confidential,
    what: &str,
    holds: impl Fn(&mut Confidential) -> Result<bool, Failure>,
) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    while !holds(guest)? {
        if let Some(status) = guest.machine.exited()? {
            return Err(Failure::new(format!(
                "does not hold: {what}: QEMU ended, {status}"
            )));
        }
        if Instant::now() > deadline {
            return Err(Failure::new(format!("does not hold: {what}")));
        }
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The kernel can't allocate what a vCPU needs, for as long as it pleases.
fn no_page(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let faults = Faults::under("kvm_gmem_get_pfn")?;
    guest.convert(scenario, PRIVATE, PRIVATE_BYTES, true)?;
    let failures = total(guest, "failures")?;
    let vcpus = guest.machine.vcpus()?;
    faults.fail_all(&vcpus, true)?;
    let begun = guest
        .monitor
        .begin(&format!("fill {PRIVATE:#x} {PRIVATE_BYTES:#x} 1"))?;
    until(
        guest,
        "the fault that can't be served is counted",
        |guest| Ok(total(guest, "failures")? > failures + 20),
    )?;
    let event = guest
        .machine
        .qmp
        .event("GMEM_CONVERSION_FAILED", PATIENCE)?;
    scenario.fact("event", event["data"].clone());
    scenario.check_equal(
        event["data"]["gpa"].as_u64(),
        Some(PRIVATE),
        "the event's address",
    )?;
    can_be_managed(scenario, guest)?;
    let waits = said(guest, &["CPU 0 waits", &format!("{PRIVATE:#x}")]);
    scenario.fact("QEMU says", waits.clone());
    scenario.check_equal(waits.len(), 1, "how often QEMU says that the vCPU waits")?;
    scenario.check(
        waits[0].contains("no memory"),
        format!("that line says why: {}", waits[0]),
    )?;

    faults.fail_all(&vcpus, false)?;
    guest.monitor.end(begun)?;
    guest.ledger.fill(PRIVATE, PRIVATE_BYTES, 1);
    guest.agree(scenario, "there is memory again")?;

    // What waits can be reset, too.
    faults.fail_all(&vcpus, true)?;
    let place = PRIVATE + MIB;
    guest.convert(scenario, place, PAGE, true)?;
    let failures = total(guest, "failures")?;
    guest
        .monitor
        .begin(&format!("fill {place:#x} {PAGE:#x} 2"))?;
    until(guest, "the vCPU waits again", |guest| {
        Ok(total(guest, "failures")? > failures + 3)
    })?;
    guest.machine.qmp.execute("system_reset", json!({}))?;
    faults.fail_all(&vcpus, false)?;
    guest.monitor.wait_until_ready()?;
    guest.ledger.reset();
    guest.agree(scenario, "reset while a vCPU waited")
}

/// A vCPU that waits for memory stops, goes on and shows its registers when it is asked to.
fn can_be_managed(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    scenario.check_equal(status(guest)?, "running".into(), "the VM's status")?;
    guest.machine.qmp.execute("stop", json!({}))?;
    scenario.check_equal(
        status(guest)?,
        "paused".into(),
        "the VM's status after stop",
    )?;
    let registers = guest.machine.qmp.execute(
        "human-monitor-command",
        json!({"command-line": "info registers"}),
    )?;
    scenario.check(
        registers.as_str().is_some_and(|text| text.contains("RIP=")),
        "the vCPU's registers can be seen",
    )?;
    guest.machine.qmp.execute("cont", json!({}))?;
    scenario.check_equal(
        status(guest)?,
        "running".into(),
        "the VM's status after cont",
    )?;
    scenario.fact("while it waits", "stop, info registers and cont work");
    Ok(())
}

/// A vCPU's thread that the host lets run for some milliseconds, and then for many times as long not at all, as under a
/// limit on processor time (cpu.max): others that never rest have the processors then.
struct Throttled {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Throttled {
    fn new(vcpu: u32) -> Result<Self, Failure> {
        give_way(vcpu, true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let rival = |stop: Arc<AtomicBool>| move || while !stop.load(Relaxed) {};
        let mut threads: Vec<_> = (0..2).map(|_| spawn(rival(stop.clone()))).collect();
        let stopped = stop.clone();
        threads.push(spawn(move || {
            while !stopped.load(Relaxed) {
                for (idle, milliseconds) in [(true, 60), (false, 10)] {
                    let _ = give_way(vcpu, idle);
                    sleep(Duration::from_millis(milliseconds));
                }
            }
        }));
        Ok(Self { stop, threads })
    }
}

impl Drop for Throttled {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Whether a thread only gets what nobody else wants.
fn give_way(thread: u32, idle: bool) -> Outcome {
    let parameters = libc::sched_param { sched_priority: 0 };
    let policy = match idle {
        true => libc::SCHED_IDLE,
        false => libc::SCHED_OTHER,
    };
    // SAFETY: the structure outlives the call.
    match unsafe { libc::sched_setscheduler(thread as libc::pid_t, policy, &parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error())
            .attempt(|| format!("changing the policy of thread {thread}")),
    }
}

/// One vCPU reads a page that the other one turns private and back. No fault of the first is taken for more than an echo:
/// nothing waits, nothing is converted but what was asked for.
fn echoes(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let before = (total(guest, "failures")?, total(guest, "requests")?);
    let mut rounds = 0;
    let mut reads = 0;
    // Where conversion is in place, echoes are known to come, a few in a hundred conversions.
    while rounds == 0 || guest.in_place && rounds < 10 && total(guest, "stale-faults")? == 0 {
        reads += guest.monitor.flip_beside_reads(FLIPS, FLIPPED)?;
        rounds += 1;
        scenario.progress(format!(
            "{reads} reads beside {rounds} rounds of conversions"
        ));
    }
    let echoes = total(guest, "stale-faults")?;
    scenario.fact("conversions", rounds * 2 * FLIPS);
    scenario.fact("reads", reads);
    scenario.fact("stale-faults", echoes);
    if guest.in_place {
        scenario.check(echoes > 0, "some faults were echoes")?;
    }
    let vcpu = guest.machine.vcpus()?[0];
    let throttled = Throttled::new(vcpu)?;
    let reads = guest.monitor.flip_beside_reads(MANY_FLIPS, FLIPPED)?;
    drop(throttled);
    let echoes = total(guest, "stale-faults")? - echoes;
    scenario.fact("reads of a throttled vCPU", reads);
    scenario.fact("stale-faults of a throttled vCPU", echoes);
    scenario.check(reads > 0, "the throttled vCPU has run meanwhile")?;
    let requests = 2 * (rounds * FLIPS + MANY_FLIPS);
    let after = (total(guest, "failures")?, total(guest, "requests")?);
    let expected = (before.0, before.1 + requests);
    scenario.check_equal(after, expected, "query-gmem's failures and requests")?;
    guest.agree(scenario, "after a storm beside reads")
}

/// KVM's attributes of guest addresses, changed behind QEMU's back.
fn set_private(guest: &Confidential, gpa: u64, private: bool) -> Outcome {
    let pid = guest.machine.pid();
    let file = descriptor(pid, "anon_inode:kvm-vm")?;
    let attributes = if private {
        KVM_MEMORY_ATTRIBUTE_PRIVATE
    } else {
        0
    };
    let result = in_the_name_of(
        pid,
        libc::SYS_ioctl,
        &[file, KVM_SET_MEMORY_ATTRIBUTES],
        &[gpa, PAGE, attributes, 0],
    )?;
    match result {
        0 => Ok(()),
        errno => Err(Failure::new(format!(
            "KVM_SET_MEMORY_ATTRIBUTES of {gpa:#x} in QEMU's name: {errno}"
        ))),
    }
}

fn descriptor(pid: u32, link: &str) -> Result<u64, Failure> {
    let directory = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&directory).attempt(|| format!("reading {directory}"))?;
    entries
        .flatten()
        .find(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == link))
        .and_then(|entry| entry.file_name().to_str()?.parse().ok())
        .attempt(|| format!("QEMU has no {link}"))
}

/// The VM has stopped for good, once, and QEMU says what was accessed and why that can't be served.
fn stopped(scenario: &mut Scenario, guest: &mut Confidential, gpa: u64, words: &[&str]) -> Outcome {
    until(guest, "the VM's status becomes internal-error", |guest| {
        Ok(status(guest)? == "internal-error")
    })?;
    let lines = said(guest, &["cannot go on", &format!("{gpa:#x}")]);
    scenario.fact("QEMU says", lines.clone());
    scenario.check_equal(
        lines.len(),
        1,
        "how often QEMU says that the vCPU can't go on",
    )?;
    for word in words {
        scenario.check(
            lines[0].contains(word),
            format!("{:?} has the words {word:?}", lines[0]),
        )?;
    }
    scenario.check(
        !said(guest, &["RIP=", "RFL="]).is_empty(),
        "QEMU shows the registers",
    )?;
    let refusal = guest.machine.qmp.try_execute("cont", json!({}))?;
    scenario.check(refusal.is_err(), "cont is refused before a reset")
}

/// The guest reads at an address that is private and where nothing is.
fn hole(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    set_private(guest, HOLE, true)?;
    guest.monitor.begin(&format!("read64 {HOLE:#x}"))?;
    stopped(
        scenario,
        guest,
        HOLE,
        &["private access", "not guest memory"],
    )?;
    set_private(guest, HOLE, false)?;
    guest.machine.qmp.execute("system_reset", json!({}))?;
    guest.machine.qmp.execute("cont", json!({}))?;
    guest.monitor.wait_until_ready()?;
    guest.ledger.reset();
    guest.fill(PRIVATE, PAGE, 3)?;
    guest.agree(scenario, "reset after it stopped")
}

/// KVM has lost the file of private pages: all say that the page is private, and nobody can give it to the vCPU.
fn no_file(scenario: &mut Scenario) -> Outcome {
    let mut guest = start(scenario)?;
    guest.convert(scenario, PRIVATE, PAGE, true)?;
    let pid = guest.machine.pid();
    for path in guest_memfds(pid)? {
        let number = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        let number: u64 = number.attempt(|| format!("{} is no descriptor", path.display()))?;
        let result = in_the_name_of(pid, libc::SYS_close, &[number], &[])?;
        scenario.check_equal(result, 0, "closing a guest_memfd in QEMU's name")?;
    }
    guest.monitor.begin(&format!("read64 {PRIVATE:#x}"))?;
    stopped(
        scenario,
        &mut guest,
        PRIVATE,
        &["private access", "private already"],
    )?;
    guest.machine.kill()
}
