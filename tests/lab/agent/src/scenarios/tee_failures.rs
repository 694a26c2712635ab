// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an SNP or TDX guest's launch can fail by: each command at the start, where QEMU ends with a sentence and leaves nothing
//! behind, and at a reset, where the VM stands still until another reset makes a new one; commands that are to be tried again;
//! and want of the host's memory, that the guest is told of: it may pass (TDX hears RETRY), or is a bound (it does not).

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::{Attempt, Failure};
use crate::host::huge_pages::Pool;
use crate::host::passthrough::{to_vfio, EDU};
use crate::host::{kernel, pages, tee};
use crate::ledger::{Block, PAGE};
use crate::machine::{Machine, Surroundings};
use crate::rebuilt::{reset, status};
use crate::scenario::{Outcome, Scenario};
use crate::tee::{Host, Kind, Launch};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;
const RAM_BYTES: u64 = 64 * MIB;
/// Private at the start.
const RANGE: u64 = 32 * MIB;
const GUESTS: &str = "/sys/kernel/debug/kvm";

/// The `nth` command of a name fails with an errno, and QEMU's sentence names something.
type Failing = (&'static str, u32, i32, &'static str);

const SNP_AT_START: &[Failing] = &[
    ("snp-platform-status", 1, libc::EIO, "platform status"),
    ("snp-init2", 1, libc::ENOMEM, "failed to initialize"),
    ("snp-launch-start", 1, libc::EIO, "encryption context"),
    (
        "snp-launch-update",
        2,
        libc::EIO,
        "SNP_LAUNCH_UPDATE ret=-5",
    ),
    (
        "snp-launch-finish",
        1,
        libc::ENOMEM,
        "SNP_LAUNCH_FINISH ret=-12",
    ),
];

const TDX_AT_START: &[Failing] = &[
    (
        "tdx-capabilities",
        1,
        libc::EIO,
        "KVM_TDX_CAPABILITIES failed",
    ),
    ("tdx-init-vm", 1, libc::ENOMEM, "KVM_TDX_INIT_VM failed"),
    ("tdx-init-vcpu", 1, libc::EIO, "KVM_TDX_INIT_VCPU failed"),
    (
        "tdx-get-cpuid",
        1,
        libc::ENOMEM,
        "kvm_arch_init_vcpu failed",
    ),
    (
        "tdx-init-mem-region",
        3,
        libc::EIO,
        "KVM_TDX_INIT_MEM_REGION failed",
    ),
    (
        "tdx-finalize-vm",
        1,
        libc::ENOMEM,
        "KVM_TDX_FINALIZE_VM failed",
    ),
];

const SNP_AT_RESET: &[Failing] = &[
    ("snp-init2", 1, libc::ENOMEM, "failed to initialize"),
    ("snp-launch-start", 1, libc::EIO, "encryption context"),
    (
        "snp-launch-update",
        3,
        libc::EIO,
        "could not be launched again",
    ),
    (
        "snp-launch-finish",
        1,
        libc::ENOMEM,
        "could not be launched again",
    ),
];

const TDX_AT_RESET: &[Failing] = &[
    ("tdx-init-vm", 1, libc::ENOMEM, "KVM_TDX_INIT_VM failed"),
    ("tdx-get-cpuid", 1, libc::EIO, "KVM_TDX_GET_CPUID failed"),
    ("tdx-init-vcpu", 1, libc::EIO, "could not be launched again"),
    (
        "tdx-init-mem-region",
        2,
        libc::EIO,
        "could not be launched again",
    ),
    (
        "tdx-finalize-vm",
        1,
        libc::ENOMEM,
        "could not be launched again",
    ),
];

/// Worth another try at once, which QEMU makes.
const SNP_AGAIN: &[&str] = &["snp-launch-update"];
const TDX_AGAIN: &[&str] = &["tdx-init-vm", "tdx-init-mem-region"];

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let host = Host::of(scenario)?;
    let (at_start, at_reset, again) = match host.kind {
        Kind::Snp => (SNP_AT_START, SNP_AT_RESET, SNP_AGAIN),
        Kind::Tdx => (TDX_AT_START, TDX_AT_RESET, TDX_AGAIN),
    };
    for failing in at_start {
        scenario.prefix(&format!("{} at the start: ", failing.0));
        fails_at_start(scenario, &host, failing)?;
    }
    if host.kind == Kind::Snp {
        scenario.prefix("no kernel: ");
        no_kernel_to_hash(scenario, &host)?;
    }
    scenario.prefix("");
    let mut guest = None;
    for command in again {
        scenario.prefix(&format!("{command} again: "));
        drop(guest.take());
        guest = Some(is_tried_again(scenario, &host, command)?);
    }
    let mut guest = guest.attempt(|| "no command is tried again".into())?;
    for failing in at_reset {
        scenario.prefix(&format!("{} at a reset: ", failing.0));
        fails_at_reset(scenario, &mut guest, failing)?;
    }
    scenario.prefix("");
    guest.finish(scenario)?;
    if !kernel::in_place() {
        scenario.prefix("QEMU's own memory: ");
        beyond_ram(scenario, &host)?;
    }
    scenario.prefix("max-runs: ");
    runs_are_a_bound(scenario, &host)?;
    scenario.prefix("empty pool: ");
    an_empty_pool(scenario, &host)?;
    scenario.prefix("locked memory: ");
    locked_memory(scenario, &host)
}

/// Nothing of a guest is left in the kernel: no memory, no VM.
fn nothing_is_left(scenario: &Scenario, before: u64) -> Outcome {
    scenario.check_equal(pages::outside_shmem()?, before, "bytes in guest_memfds")?;
    let entries = fs::read_dir(GUESTS).attempt(|| format!("reading {GUESTS}"))?;
    let guests = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("lab_tee").exists());
    scenario.check_equal(guests.count(), 0, "guests that KVM has")
}

fn fails_at_start(scenario: &mut Scenario, host: &Host, failing: &Failing) -> Outcome {
    let &(command, nth, errno, names) = failing;
    let before = pages::outside_shmem()?;
    tee::fail(command, nth, errno)?;
    let words = Launch::new(host, RAM_BYTES).words();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let directory = scenario.directory().join(format!("start-{command}"));
    let said = Machine::refusal(&directory, &words)?;
    scenario.fact("QEMU's last word", said.as_str());
    scenario.check(said.contains(names), format!("it names {names}: {said}"))?;
    scenario.check_equal(tee::failure_left()?.as_str(), "", "what is still to fail")?;
    nothing_is_left(scenario, before)
}

/// The firmware has a page for a kernel's hashes, and there is no kernel.
fn no_kernel_to_hash(scenario: &mut Scenario, host: &Host) -> Outcome {
    let launch = Launch::new(host, RAM_BYTES).guest_properties(",kernel-hashes=on");
    let words = launch.words();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let directory = scenario.directory().join("no-kernel");
    Machine::refusal(&directory, &words)?;
    let path = directory.join("qemu.stderr");
    let said = fs::read_to_string(&path).attempt(|| format!("reading {}", path.display()))?;
    scenario.fact("QEMU says", said.trim());
    scenario.check(
        said.contains("kernel-hashes=on needs a -kernel"),
        format!("it names the reason: {said}"),
    )
}

fn is_tried_again(
    scenario: &mut Scenario,
    host: &Host,
    command: &str,
) -> Result<Confidential, Failure> {
    tee::fail(command, 1, libc::EAGAIN)?;
    let directory = scenario.directory().join(format!("again-{command}"));
    let mut guest = Launch::new(host, RAM_BYTES).start(&directory)?;
    scenario.check_equal(tee::failure_left()?.as_str(), "", "what is still to fail")?;
    guest.machine.is_silent()?;
    guest.agree(scenario, "after a launch that was tried again")?;
    Ok(guest)
}

fn fails_at_reset(scenario: &mut Scenario, guest: &mut Confidential, failing: &Failing) -> Outcome {
    let &(command, nth, errno, names) = failing;
    let said_before = guest.machine.complaints().len();
    tee::fail(command, nth, errno)?;
    reset(&mut guest.machine)?;
    scenario.check_equal(tee::failure_left()?.as_str(), "", "what is still to fail")?;
    let said = guest.machine.complaints()[said_before..].to_string();
    scenario.fact("QEMU says", said.trim());
    scenario.check(said.contains(names), format!("QEMU names {names}: {said}"))?;
    scenario.check_equal(
        status(&mut guest.machine)?.as_str(),
        "internal-error",
        "the VM's state",
    )?;
    let refusal = guest.machine.qmp.refusal("cont", json!({}))?;
    scenario.fact("cont", refusal);

    reset(&mut guest.machine)?;
    // It had stopped: as after any internal error, somebody has to say that it may go on.
    if status(&mut guest.machine)? != "running" {
        guest.machine.qmp.execute("cont", json!({}))?;
    }
    guest.monitor.wait_until_ready()?;
    guest.ledger.reset();
    guest.reopen()?;
    guest.agree(scenario, "after the next reset")
}

/// What the guest hears where the host has nothing at this moment.
fn wants(kind: Kind) -> i64 {
    match kind {
        Kind::Snp => i64::from(libc::EINVAL),
        Kind::Tdx => RETRY,
    }
}

/// What it hears where asking again is no use.
fn never(kind: Kind) -> i64 {
    match kind {
        Kind::Snp => i64::from(libc::EINVAL),
        Kind::Tdx => INVALID_OPERAND,
    }
}

/// As the shim says them in RAX.
const RETRY: i64 = 1;
const INVALID_OPERAND: i64 = 2;

fn runs_are_a_bound(scenario: &mut Scenario, host: &Host) -> Outcome {
    let directory = scenario.directory().join("runs");
    // Two around what the firmware shares, a third by a page in the middle of one.
    let mut guest = Launch::new(host, RAM_BYTES)
        .properties(",max-runs=3")
        .start(&directory)?;
    guest.convert(scenario, RANGE, PAGE, false)?;
    let result = guest.monitor.convert(RANGE + 2 * PAGE, PAGE, false)?;
    scenario.fact("the guest hears", result);
    scenario.check_equal(result, never(host.kind), "what the guest hears")?;
    guest.agree(scenario, "one run more was refused")?;
    guest.convert(scenario, RANGE, PAGE, true)?;
    guest.convert(scenario, RANGE + 2 * PAGE, PAGE, false)?;
    guest.agree(scenario, "another page is shared")?;
    guest.finish(scenario)
}

/// Memory that is not ours converts whole or not at all, too.
fn beyond_ram(scenario: &mut Scenario, host: &Host) -> Outcome {
    let directory = scenario.directory().join("stock");
    let mut guest = Launch::new(host, RAM_BYTES).stock().start(&directory)?;
    for private in [false, true] {
        let result = guest.monitor.convert(RAM_BYTES - PAGE, 2 * PAGE, private)?;
        scenario.fact(&format!("beyond RAM, private: {private}"), result);
        scenario.check_equal(result, never(host.kind), "what the guest hears")?;
        guest.agree(scenario, "a request beyond RAM was refused")?;
    }
    guest.convert(scenario, RAM_BYTES - PAGE, PAGE, false)?;
    guest.agree(scenario, "the last page is shared")?;
    guest.finish(scenario)
}

fn huge(host: &Host) -> Launch<'_> {
    let object = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES},hugetlb=on,hugetlbsize=2M");
    Launch::new(host, RAM_BYTES)
        .blocks(vec![Block::huge("ram0", RAM_BYTES, HUGE)], RAM_BYTES)
        .machine("memory-backend=ram0")
        .arguments(&["-object", &object])
}

fn an_empty_pool(scenario: &mut Scenario, host: &Host) -> Outcome {
    let pool = Pool::of(HUGE)?;
    let directory = scenario.directory().join("pool");
    if kernel::in_place() {
        // A file in place takes all of its pages when it is made.
        pool.resize(RAM_BYTES / HUGE - 1)?;
        let before = pages::outside_shmem()?;
        return refused_for_want_of_pages(scenario, host, &directory, before);
    }
    // One for what the firmware shares.
    pool.resize(1)?;
    // Whoever had huge pages before may be about to end.
    let deadline = Instant::now() + Duration::from_secs(30);
    while pool.free()? == 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    scenario.check_equal(pool.free()?, 1, "free huge pages before the start")?;
    let mut guest = huge(host).start(&directory)?;
    scenario.check_equal(pool.free()?, 0, "free huge pages, the firmware's taken")?;
    let result = guest.monitor.convert(RANGE, 2 * HUGE, false)?;
    scenario.fact("the guest hears", result);
    scenario.check_equal(result, wants(host.kind), "what the guest hears")?;
    guest.agree_but_kernel(scenario, "refused for want of huge pages")?;
    pool.resize(3)?;
    guest.convert(scenario, RANGE, 2 * HUGE, false)?;
    guest.fill(RANGE, 2 * HUGE, 1)?;
    guest.agree_but_kernel(scenario, "with huge pages")?;
    scenario.check_equal(pool.free()?, 0, "free huge pages")?;
    guest.finish(scenario)?;
    scenario.check_equal(pool.free()?, pool.total()?, "free huge pages at the end")
}

fn refused_for_want_of_pages(
    scenario: &mut Scenario,
    host: &Host,
    directory: &Path,
    before: u64,
) -> Outcome {
    let words = huge(host).words();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let said = Machine::refusal(directory, &words)?;
    scenario.fact("QEMU's last word", said.as_str());
    scenario.check(
        said.contains("huge pages of 2 MiB") && said.contains("nr_hugepages"),
        format!("it names the pool: {said}"),
    )?;
    nothing_is_left(scenario, before)
}

/// A device pins what is shared: the firmware's range fits, and no more.
fn locked_memory(scenario: &mut Scenario, host: &Host) -> Outcome {
    let passthrough = format!("vfio-pci,host={},iommufd=iommufd0", to_vfio(&EDU)?);
    let limited = Surroundings {
        limited: true,
        ..Surroundings::default()
    };
    let mut guest = Launch::new(host, RAM_BYTES)
        .arguments(&["-object", "iommufd,id=iommufd0", "-device", &passthrough])
        .surroundings(limited)
        .start(&scenario.directory().join("locked"))?;
    guest.machine.limit_locked(4 * MIB)?;
    let result = guest.monitor.convert(RANGE, 8 * MIB, false)?;
    scenario.fact("the guest hears", result);
    scenario.check_equal(result, wants(host.kind), "what the guest hears")?;
    guest.machine.limit_locked(libc::RLIM_INFINITY)?;
    guest.convert(scenario, RANGE, 8 * MIB, false)?;
    guest.fill(RANGE, 8 * MIB, 1)?;
    guest.agree(scenario, "with a higher limit")?;
    guest.finish(scenario)
}
