// SPDX-License-Identifier: MIT OR Apache-2.0
//! A Linux guest with all its RAM on a guest_memfd, with and without SMM (which makes KVM see all memory twice).

use crate::boot::CommandLine;
use crate::host::files;
use crate::host::memory::{anonymous_resident, backing, guest_memfds, threads};
use crate::host::pages;
use crate::host::tracing::{
    Ioctls, KVM_CREATE_GUEST_MEMFD, KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2,
};
use crate::linux_guest::LinuxGuest;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};

const RAM_BYTES: u64 = 512 << 20;
/// More than half of RAM, with room for the kernel.
const PATTERN_BYTES: u64 = 320 << 20;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    for smm in ["on", "off"] {
        scenario.prefix(&format!("smm-{smm}: "));
        once(scenario, smm)?;
    }
    Ok(())
}

fn once(scenario: &mut Scenario, smm: &str) -> Outcome {
    let before = pages::outside_shmem()?;
    let ioctls = Ioctls::start()?;
    let directory = scenario.directory().join(format!("smm-{smm}"));
    let mut guest = LinuxGuest::start(
        &directory,
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}"),
            "-machine",
            &format!("q35,accel=kvm,smm={smm},memory-backend=ram0"),
            "-m",
            "512M",
            "-smp",
            "2",
        ],
        &format!("lab.job=pattern lab.bytes={PATTERN_BYTES}"),
    )?;
    let result = guest.result()?;
    scenario.progress("pattern written and verified");
    scenario.fact("pattern_bytes", result["bytes"].clone());
    scenario.fact("guest_total_bytes", result["linux_total"].clone());
    scenario.check_equal(
        result["bytes"].as_u64(),
        Some(PATTERN_BYTES),
        "bytes written and verified by the guest",
    )?;

    guest.machine.is_silent()?;
    let pid = guest.machine.pid();
    let mapping = backing(pid, RAM_BYTES)?;
    scenario.fact("mapping", mapping.path.clone());
    scenario.check(
        mapping.is_guest_memfd(),
        "the mapping behind RAM is of a guest_memfd",
    )?;
    let kept = files::are_kept(scenario, pid, &[], "the guest at work")?;
    scenario.fact("files that no child inherits", kept);
    let held = pages::outside_shmem()?.saturating_sub(before);
    scenario.fact("guest_memfd_bytes", held);
    scenario.check(
        !pages::can_tell() || (PATTERN_BYTES..=RAM_BYTES).contains(&held),
        format!("{held} bytes in guest_memfds are at least the pattern and at most RAM"),
    )?;
    let anonymous = anonymous_resident(pid)?;
    scenario.fact("qemu_anonymous_bytes", anonymous);
    scenario.check(
        anonymous < PATTERN_BYTES,
        "RAM is not in QEMU's anonymous memory",
    )?;

    let calls = ioctls.by_command(&threads(pid)?)?;
    let count = |command| calls.get(&command).copied().unwrap_or(0);
    if ioctls.count() {
        scenario.fact("create_guest_memfd_calls", count(KVM_CREATE_GUEST_MEMFD));
        scenario.fact("memory_region2_calls", count(KVM_SET_USER_MEMORY_REGION2));
        scenario.fact("memory_region1_calls", count(KVM_SET_USER_MEMORY_REGION));
    }
    // What the library made to try the kernel is gone again.
    scenario.check_equal(guest_memfds(pid)?.len(), 1, "guest_memfds that QEMU holds")?;

    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    let block = gmem.block("ram0")?;
    for (name, expected) in [("size", RAM_BYTES), ("private", 0), ("shared", RAM_BYTES)] {
        scenario.check_equal(
            block.number(name)?,
            expected,
            format!("query-gmem's {name}"),
        )?;
    }
    scenario.fact("backing", block.text("backing")?);
    scenario.check_equal(block.text("backing")?, "in-place", "query-gmem's backing")?;

    guest.finish()?;
    let left = pages::outside_shmem()?.saturating_sub(before);
    scenario.check_equal(left, 0, "bytes in guest_memfds after QEMU's end")
}
