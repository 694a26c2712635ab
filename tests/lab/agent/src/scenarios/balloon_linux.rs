// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that Linux gives back with its own drivers, of an ordinary guest and of a confidential one, by balloon and by
//! free-page report: the host has it, the books stay, and Linux uses it again. Beside a device that comes later nothing is
//! taken away.
//!
//! The confidential guest's memory is all shared. Nothing in Linux asks KVM to make pages of a KVM_X86_SW_PROTECTED_VM private,
//! and the lab's emulated processor has KVM decode each intercepted instruction from shared memory: Linux's text and page tables
//! could not be private here. What becomes of private pages is `balloon`'s, with the payload.

use crate::boot::CommandLine;
use crate::failure::Failure;
use crate::host::passthrough::{to_vfio, EDU};
use crate::host::{kernel, pages};
use crate::linux_guest::LinuxGuest;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const RAM_BYTES: u64 = 384 * MIB;
/// What the guest's job writes and reads.
const JOB_BYTES: u64 = 224 * MIB;
/// What the balloon leaves the guest.
const LEFT_BYTES: u64 = 136 * MIB;
/// What the host has to have back of the job's memory; Linux keeps some of it for itself.
const LEAST_BACK: u64 = 96 * MIB;
/// A page for a page through two levels of emulation, or reports that Linux makes some seconds later.
const PATIENCE: Duration = Duration::from_secs(180);
/// Linux's driver does not take part in `iommu_platform`, which QEMU switches on for each virtio device of a confidential guest.
const BALLOON: &str = "virtio-balloon-pci,iommu_platform=off";

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    // Its memory is the same on either kind of kernel.
    if !kernel::in_place() {
        scenario.prefix("ordinary: ");
        ordinary(scenario)?;
    }
    scenario.prefix("confidential: ");
    confidential(scenario)
}

fn ordinary(scenario: &mut Scenario) -> Outcome {
    let edu = to_vfio(&EDU)?;
    let mut linux = Linux::start(
        scenario,
        "ordinary",
        &[
            "-machine",
            "q35,accel=kvm,memory-backend=ram0",
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            "pcie-root-port,id=port0,chassis=1",
            "-device",
            BALLOON,
        ],
    )?;
    linux.books(scenario, "after the job")?;
    let used = linux.held()?;
    scenario.fact("bytes on the host before the balloon", used);
    scenario.check(
        used >= JOB_BYTES,
        format!("the host holds what the guest wrote, {JOB_BYTES} bytes: {used}"),
    )?;
    let left = linux.inflated(scenario)?;
    scenario.check(
        left + LEAST_BACK <= used,
        format!("of {used} bytes the host has {LEAST_BACK} back: it holds {left}"),
    )?;
    linux.in_use_again(scenario)?;
    let again = linux.held()?;
    scenario.fact("bytes on the host in use again", again);
    scenario.check(
        again >= JOB_BYTES,
        format!("the guest has its memory again: {again} bytes"),
    )?;
    linux.is_silent(scenario, "before a device")?;

    linux.guest.machine.qmp.execute(
        "device_add",
        json!({"driver": "vfio-pci", "bus": "port0", "host": edu, "iommufd": "iommufd0"}),
    )?;
    let mapped = linux.held()?;
    scenario.fact("bytes on the host beside a device", mapped);
    scenario.check(
        mapped >= RAM_BYTES,
        format!("a device has all memory mapped: {mapped} bytes"),
    )?;
    linux.resize(LEFT_BYTES)?;
    let ballooned = linux.held()?;
    scenario.fact("bytes then with the balloon inflated", ballooned);
    scenario.check(
        ballooned >= RAM_BYTES,
        format!("nothing is taken away beside a device: the host holds {ballooned} bytes"),
    )?;
    linux.books(scenario, "ballooned beside a device")?;
    linux.in_use_again(scenario)?;
    linux.guest.machine.is_silent()?;
    linux.finish(scenario)
}

fn confidential(scenario: &mut Scenario) -> Outcome {
    let balloon = format!("{BALLOON},free-page-reporting=on");
    let mut linux = Linux::start(
        scenario,
        "confidential",
        &[
            "-object",
            "sw-protected-guest,id=cgs0",
            "-machine",
            "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0",
            "-device",
            &balloon,
        ],
    )?;
    // The job has freed its memory, and the guest says so some seconds later.
    let reported = linux.falls_to(JOB_BYTES - LEAST_BACK)?;
    scenario.fact("bytes on the host after free-page reports", reported);
    scenario.check(
        reported <= JOB_BYTES - LEAST_BACK,
        format!("of {JOB_BYTES} bytes that the guest freed the host has {LEAST_BACK} back: it holds {reported}"),
    )?;
    linux.books(scenario, "after the reports")?;
    linux.inflated(scenario)?;
    linux.in_use_again(scenario)?;
    let again = linux.falls_to(JOB_BYTES - LEAST_BACK)?;
    scenario.fact("bytes on the host after more reports", again);
    scenario.check(
        again <= JOB_BYTES - LEAST_BACK,
        format!("what was used once more is reported once more: the host holds {again} bytes"),
    )?;
    linux.is_silent(scenario, "at the end")?;
    linux.finish(scenario)
}

/// A Linux guest that has done its job.
struct Linux {
    guest: LinuxGuest,
    /// Bytes of files on the host before it was there.
    before: u64,
}

impl Linux {
    fn start(scenario: &Scenario, name: &str, more: &[&str]) -> Result<Self, Failure> {
        let before = files()?;
        let memory = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}");
        let mut arguments = vec!["-object", &memory, "-m", "384M"];
        arguments.extend(more);
        let job = format!("lab.job=pattern lab.bytes={JOB_BYTES}");
        let directory = scenario.directory().join(name);
        let mut guest = LinuxGuest::start(&directory, &arguments, &job)?;
        guest.result()?;
        guest.machine.is_silent()?;
        scenario.progress(format!("{name}: Linux is there"));
        Ok(Self { guest, before })
    }

    /// Bytes of the guest's memory on the host.
    fn held(&self) -> Result<u64, Failure> {
        Ok(files()?.saturating_sub(self.before))
    }

    /// Waits until it is no more than that; what it is then.
    fn falls_to(&self, most: u64) -> Result<u64, Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let held = self.held()?;
            if held <= most || Instant::now() >= deadline {
                return Ok(held);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Has the guest's driver leave it so many bytes.
    fn resize(&mut self, bytes: u64) -> Outcome {
        let qmp = &mut self.guest.machine.qmp;
        qmp.execute("balloon", json!({"value": bytes}))?;
        while qmp.execute("query-balloon", json!({}))?["actual"] != bytes {
            qmp.event("BALLOON_CHANGE", PATIENCE)?;
        }
        Ok(())
    }

    /// Inflates; what the host holds then.
    fn inflated(&mut self, scenario: &mut Scenario) -> Result<u64, Failure> {
        self.resize(LEFT_BYTES)?;
        let left = self.held()?;
        scenario.fact("bytes on the host with the balloon inflated", left);
        scenario.check(
            left <= LEFT_BYTES,
            format!("the guest has {LEFT_BYTES} bytes left, and the host holds no more: {left}"),
        )?;
        self.books(scenario, "with the balloon inflated")?;
        Ok(left)
    }

    /// Deflates; the guest writes and reads as much as at first.
    fn in_use_again(&mut self, scenario: &Scenario) -> Outcome {
        self.resize(RAM_BYTES)?;
        let result = self.guest.again()?;
        scenario.check_equal(
            result["bytes"].as_u64(),
            Some(JOB_BYTES),
            "bytes written and verified by the guest once more",
        )?;
        self.books(scenario, "in use again")
    }

    /// All is shared, nothing is lost or kept from devices: as it was at first.
    fn books(&mut self, scenario: &Scenario, step: &str) -> Outcome {
        let gmem = Gmem::query(&mut self.guest.machine.qmp)?;
        let block = gmem.block("ram0")?;
        for (name, expected) in [
            ("private", 0),
            ("shared", RAM_BYTES),
            ("private-runs", 0),
            ("quarantined", 0),
            ("poisoned", 0),
        ] {
            scenario.check_equal(
                block.number(name)?,
                expected,
                format!("{step}: query-gmem's {name}"),
            )?;
        }
        Ok(())
    }

    fn is_silent(&self, scenario: &Scenario, step: &str) -> Outcome {
        scenario.check_equal(
            self.guest.machine.complaints(),
            String::new(),
            format!("{step}: what QEMU has to say of the balloon"),
        )
    }

    fn finish(mut self, scenario: &Scenario) -> Outcome {
        self.guest.finish()?;
        let left = self.held()?;
        scenario.check(
            left < MIB,
            format!("the host has all memory back after QEMU's end: {left} bytes are left"),
        )
    }
}

/// Bytes of files, of whatever kind; nothing else of the lab takes much meanwhile.
fn files() -> Result<u64, Failure> {
    Ok(pages::outside_shmem()? + pages::count("nr_shmem")? * PAGE)
}
