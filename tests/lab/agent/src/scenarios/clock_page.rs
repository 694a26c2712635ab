// SPDX-License-Identifier: MIT OR Apache-2.0
//! What KVM itself writes to guest memory: the clock above all, of whose page it keeps a translation. A page that has it turns
//! private and shared again, while QEMU has the clock set anew: nothing is written to the private page, and nothing to the
//! memory that it has left. Where guests can be out of the kernel's direct map they have a clock there, Linux too.
//!
//! The kernel finds the page by the file, or does not: the lab's can do either. What it can't is refused, or seen.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Failure;
use crate::host::kernel::{self, PfnCache};
use crate::host::memory::overlap;
use crate::ledger::PAGE;
use crate::linux_guest::LinuxGuest;
use crate::machine::Machine;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
/// The page of the clock.
const CLOCK: u64 = 16 * MIB;
const STEAL: u64 = CLOCK + 0x400;
const WALL: u64 = CLOCK + 0x800;
const ROUNDS: u64 = 3;

const MSR_KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const MSR_KVM_STEAL_TIME: u32 = 0x4b56_4d03;
const ENABLED: u64 = 1;

const WITHOUT_CLOCK: [&str; 2] = ["-cpu", "host,tsc-deadline=off,-kvmclock"];

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    for by_file in [false, true] {
        let switched = PfnCache::by_file(by_file)?;
        if by_file && switched.is_none() {
            // What was seen is how this kernel is.
            break;
        }
        scenario.prefix(match by_file {
            true => "found by the file: ",
            false => "",
        });
        let can = by_file || !kernel::no_direct_map();
        if !can {
            is_refused(scenario)?;
        }
        payload(scenario, by_file, can)?;
        if kernel::no_direct_map() {
            linux(scenario, can)?;
        }
    }
    Ok(())
}

fn direct_map() -> &'static str {
    match kernel::no_direct_map() {
        true => ",direct-map=off",
        false => "",
    }
}

/// A guest that would wait for its clock for ever is not started, nor given such memory later.
fn is_refused(scenario: &mut Scenario) -> Outcome {
    let directory = scenario.directory().join("refused");
    let said = Machine::refusal(
        &directory,
        &[
            "-object",
            "memory-backend-gmem,id=ram0,size=64M,direct-map=off",
            "-m",
            "64M",
            "-machine",
            "q35,accel=kvm,smm=off,memory-backend=ram0",
        ],
    )?;
    names_remedy(scenario, &said)?;
    scenario.fact("kvm-clock with direct-map=off", said);

    let directory = scenario.directory().join("later");
    let (mut machine, _serial) = Machine::start(
        &directory,
        &["-machine", "q35,accel=kvm,smm=off", "-m", "64M", "-S"],
    )?;
    let late = json!({
        "qom-type": "memory-backend-gmem", "id": "late0", "size": MIB, "direct-map": false,
    });
    let answer = machine.qmp.try_execute("object-add", late)?;
    let said = answer.err().map(|refusal| refusal.description);
    names_remedy(scenario, said.as_deref().unwrap_or("it is not refused"))?;
    // Nothing of the trial is left in QEMU's way.
    let usual = json!({"qom-type": "memory-backend-gmem", "id": "late0", "size": MIB});
    machine.qmp.execute("object-add", usual)?;
    machine.qmp.execute("quit", json!({}))?;
    machine.wait_for_exit(std::time::Duration::from_secs(60))
}

fn names_remedy(scenario: &Scenario, said: &str) -> Outcome {
    for part in ["direct-map=off", "kvm-clock", "-cpu ...,-kvmclock"] {
        scenario.check(
            said.contains(part),
            format!("the refusal of a clock names {part}: {said}"),
        )?;
    }
    Ok(())
}

/// One guest that does what it is told.
struct Clocked {
    guest: Confidential,
}

impl Clocked {
    /// The guest asks for its clock.
    fn ask(&mut self) -> Outcome {
        self.register(MSR_KVM_SYSTEM_TIME_NEW, CLOCK | ENABLED)
    }

    fn register(&mut self, register: u32, value: u64) -> Outcome {
        let request = format!("wrmsr {register:#x} {value:#x}");
        self.guest.monitor.ask(&request).map(drop)
    }

    /// QEMU sets the clock, and KVM tells each vCPU of it.
    fn tick(&mut self) -> Outcome {
        for command in ["stop", "cont"] {
            self.guest.machine.qmp.execute(command, json!({}))?;
        }
        // It has run since.
        self.guest.monitor.ask("ping").map(drop)
    }

    /// Version and rate, if there is a clock in the page.
    fn clock(&mut self) -> Result<Option<(u32, u32)>, Failure> {
        let version = self.guest.monitor.read(CLOCK)? as u32;
        let rate = self.guest.monitor.read(CLOCK + 24)? as u32;
        Ok((version != 0 && rate != 0).then_some((version, rate)))
    }

    /// Guest, QEMU and kernel agree. Out of the direct map, this process can't look: nobody pins what QEMU has mapped.
    fn agree(&mut self, scenario: &Scenario, step: &str) -> Outcome {
        match kernel::no_direct_map() {
            true => Ok(()),
            false => self.guest.agree(scenario, step),
        }
    }

    /// Bytes that the memfd has behind the private page. In place there is no such file.
    fn left_behind(&self) -> Result<u64, Failure> {
        if self.guest.in_place {
            return Ok(0);
        }
        let extents = self.guest.shared[0].extents()?;
        Ok(overlap(&extents, &(CLOCK..CLOCK + PAGE)))
    }
}

fn payload(scenario: &mut Scenario, by_file: bool, can: bool) -> Outcome {
    let name = if by_file { "by-file" } else { "as-it-is" };
    let more: &[&str] = if can { &[] } else { &WITHOUT_CLOCK };
    let directory = scenario.directory().join(name);
    let guest = Confidential::with_one_block(&directory, RAM_BYTES, direct_map(), more)?;
    let mut clocked = Clocked { guest };
    clocked.guest.monitor.zero(CLOCK, PAGE)?;
    clocked.ask()?;
    scenario.check_equal(
        clocked.clock()?.is_some(),
        can,
        "the guest has a clock, where the kernel can",
    )?;
    if can {
        conversions(scenario, &mut clocked, by_file)?;
        reset(scenario, &mut clocked)?;
    }
    clocked.guest.finish(scenario)
}

fn conversions(scenario: &mut Scenario, clocked: &mut Clocked, by_file: bool) -> Outcome {
    clocked.register(MSR_KVM_STEAL_TIME, STEAL | ENABLED)?;
    let mut left_behind = 0;
    for round in 1..=ROUNDS {
        clocked.guest.convert(scenario, CLOCK, PAGE, true)?;
        clocked.guest.fill(CLOCK, PAGE, round)?;
        // What the page left is freed, so that whoever writes to it needs memory anew.
        clocked.guest.settle()?;
        clocked.tick()?;
        clocked.ask()?;
        clocked.register(MSR_KVM_WALL_CLOCK_NEW, WALL)?;
        clocked.tick()?;
        let difference = clocked.guest.monitor.check(CLOCK, PAGE, round)?;
        scenario.check_equal(difference, None, "no clock in the private page")?;
        left_behind += clocked.left_behind()?;
        if by_file {
            scenario.check_equal(
                left_behind,
                0,
                "bytes of stale writes behind a private page",
            )?;
            clocked.agree(scenario, &format!("round {round}, private"))?;
        }
        clocked.guest.convert(scenario, CLOCK, PAGE, false)?;
        clocked.guest.ledger.forget(CLOCK, PAGE);
        clocked.guest.monitor.zero(CLOCK, PAGE)?;
        clocked.ask()?;
        let first = clocked.clock()?;
        scenario.check(first.is_some(), "the shared page has the clock again")?;
        clocked.tick()?;
        let second = clocked.clock()?;
        scenario.check(
            second.is_some() && second != first,
            format!("and it goes on: {first:?}, {second:?}"),
        )?;
        clocked.register(MSR_KVM_WALL_CLOCK_NEW, WALL)?;
        let wall = clocked.guest.monitor.read(WALL)? as u32;
        scenario.check(wall != 0, "a wall clock")?;
    }
    clocked.register(MSR_KVM_STEAL_TIME, 0)?;
    scenario.fact("bytes of stale writes behind a private page", left_behind);
    // Else the check above could not fail.
    if kernel::is_the_labs() && !by_file && !clocked.guest.in_place {
        scenario.check(
            left_behind != 0,
            "where KVM asks userspace's mapping it writes to what the page has left",
        )?;
    }
    Ok(())
}

/// A guest that begins anew has asked for no clock.
fn reset(scenario: &mut Scenario, clocked: &mut Clocked) -> Outcome {
    clocked.guest.convert(scenario, CLOCK, PAGE, true)?;
    clocked.guest.fill(CLOCK, PAGE, 1)?;
    let guest = &mut clocked.guest;
    guest.machine.qmp.execute("system_reset", json!({}))?;
    guest.monitor.wait_until_ready()?;
    guest.ledger.reset();
    clocked.tick()?;
    let difference = clocked.guest.monitor.zeros(CLOCK, PAGE)?;
    scenario.check_equal(difference, None, "no clock after a reset")?;
    clocked.agree(scenario, "after a reset")
}

/// Linux takes the clock that it is offered, before its first message.
fn linux(scenario: &mut Scenario, can: bool) -> Outcome {
    const RAM_BYTES: u64 = 512 << 20;
    let directory = scenario
        .directory()
        .join(if can { "linux" } else { "linux-without" });
    let object = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES},direct-map=off");
    let mut arguments = vec![
        "-object",
        &object,
        "-machine",
        "q35,accel=kvm,smm=off,memory-backend=ram0",
        "-m",
        "512M",
        "-smp",
        "2",
    ];
    if !can {
        arguments.extend(WITHOUT_CLOCK);
    }
    let mut guest = LinuxGuest::start(&directory, &arguments, "lab.job=clock")?;
    let found = guest.result()?;
    for name in ["current", "available"] {
        scenario.fact(
            &format!("Linux's clock source, {name}"),
            found[name].clone(),
        );
    }
    let available = found["available"].as_str().unwrap_or_default();
    scenario.check_equal(
        available.contains("kvm-clock"),
        can,
        format!("Linux has a kvm-clock, where the kernel can: {available}"),
    )?;
    guest.machine.is_silent()?;
    guest.finish()
}
