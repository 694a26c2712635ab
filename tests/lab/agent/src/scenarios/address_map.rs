// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest moves memory about in its address map, and the host refuses to map for a device what that brings it, or to part what it
//! has: QEMU says so, the device keeps what it can, and has all of it again once the host allows it, without the guest's doing.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::Engine;
use crate::failure::Failure;
use crate::host::faults::Faults;
use crate::host::passthrough::{two_to_vfio, EDU};
use crate::ledger::PAGE;
use crate::machine::Surroundings;
use crate::plugging::Port;
use crate::qmp::{Gmem, Qmp};
use crate::scenario::{Outcome, Scenario};
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
const ORIGIN: u64 = 16 * MIB;
const SHARED: u64 = 24 * MIB;
/// What q35's first PAM register makes ROM or RAM: the BIOS's addresses, right below the RAM from 1 MiB on.
const BIOS: u64 = MIB - BIOS_BYTES;
const BIOS_BYTES: u64 = 64 << 10;
const ROM: u64 = 0;
/// What is written there goes to the ROM.
const READABLE: u64 = 0x10;
const RAM: u64 = 0x30;
/// QEMU tries again after a second, then less often.
const PATIENCE: Duration = Duration::from_secs(120);

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let [device, other] = two_to_vfio(&EDU)?;
    let mut guest = Confidential::with_one_block_in(
        scenario.directory(),
        RAM_BYTES,
        "",
        &[
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            &format!("vfio-pci,host={device},iommufd=iommufd0"),
            "-device",
            "pcie-root-port,id=port0,chassis=1",
        ],
        Surroundings {
            limited: true,
            ..Surroundings::default()
        },
    )?;
    let original = pam(&mut guest.machine.qmp)?;
    scenario.fact("the BIOS's addresses at first", format!("{original:#x}"));
    guest.agree(scenario, "at start")?;
    scenario.prefix("no more may be locked: ");
    cannot_grow(scenario, &mut guest, &other)?;
    scenario.prefix("no memory to part it: ");
    cannot_shrink(scenario, &mut guest)?;
    scenario.prefix("no memory for a moment: ");
    is_short_for_a_moment(scenario, &mut guest)?;
    scenario.prefix("");
    set_pam(&mut guest.machine.qmp, original)?;
    guest.agree(scenario, "at the end")?;
    guest.finish(scenario)
}

/// RAM appears below the window, and no more may be locked.
fn cannot_grow(scenario: &mut Scenario, guest: &mut Confidential, other: &str) -> Outcome {
    set_pam(&mut guest.machine.qmp, ROM)?;
    let mapped = number(guest, "dma-mapped")?;
    scenario.fact("bytes mapped without the BIOS's", mapped);
    guest.machine.limit_locked(0)?;
    let said = set_pam(&mut guest.machine.qmp, RAM)?;
    Engine::new(0, ORIGIN).reaches(scenario, guest, SHARED)?;
    let missing = lacks(scenario, guest, mapped + BIOS_BYTES)?;
    scenario.check(
        missing >= BIOS_BYTES,
        format!("the device lacks what was to come: {missing:#x} bytes"),
    )?;
    // The map goes on changing. Not to the ROM, which the host would have to map as well: as for all that is not ours, QEMU ends
    // where it refuses that.
    for value in [READABLE, RAM] {
        set_pam(&mut guest.machine.qmp, value)?;
        lacks(scenario, guest, mapped + BIOS_BYTES)?;
    }

    scenario.check(
        said.contains(&format!("assigned devices do not reach {missing:#x} bytes")),
        format!("QEMU says how much devices lack: {said}"),
    )?;
    scenario.fact("QEMU says", said.trim());

    // Another device would lack it as well.
    let port = Port {
        bus: "port0",
        device: "edu1",
    };
    let refusal = port.try_plug(guest, other, "iommufd0")?.err();
    let said = refusal.map(|refusal| refusal.description);
    scenario.check(
        said.iter()
            .any(|said| said.contains("the device would not reach") && said.contains("ulimit -l")),
        format!("a device that would lack memory is refused: {said:?}"),
    )?;
    lacks(scenario, guest, mapped + BIOS_BYTES)?;

    guest.machine.limit_locked(libc::RLIM_INFINITY)?;
    port.plug(guest, other, "iommufd0")?;
    scenario.check_equal(
        number(guest, "dma-missing")?,
        0,
        "what devices lack once another one has joined",
    )?;
    has_all_again(scenario, guest, mapped + BIOS_BYTES)?;
    port.unplug(guest)?;
    has_all_again(scenario, guest, mapped + BIOS_BYTES)
}

/// A part of RAM can't be written any more, which begins amid a range that is mapped as one, and the kernel has no memory to part it.
fn cannot_shrink(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    join_at_the_bios(scenario, guest)?;
    let mapped = number(guest, "dma-mapped")?;
    let faults = Faults::under("iommufd_fops_ioctl")?;
    let main_thread = [guest.machine.pid()];
    faults.fail_all(&main_thread, true)?;
    let set = set_pam(&mut guest.machine.qmp, READABLE);
    let missing = number(guest, "dma-missing");
    faults.fail_all(&main_thread, false)?;
    scenario.fact("QEMU says", set?.trim());
    let missing = missing?;
    scenario.check(
        missing > RAM_BYTES / 2,
        format!("the device lacks what the kernel would not part: {missing:#x} bytes"),
    )?;
    has_all_again(scenario, guest, mapped)?;
    set_pam(&mut guest.machine.qmp, RAM)?;
    has_all_again(scenario, guest, mapped)
}

/// The same for a moment: a few allocations fail, what is tried next does not, and the device lacks nothing.
fn is_short_for_a_moment(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    for count in [1, 4, 8] {
        join_at_the_bios(scenario, guest)?;
        let mapped = number(guest, "dma-mapped")?;
        let faults = Faults::under("iommufd_fops_ioctl")?;
        faults.at_most(count)?;
        let main_thread = [guest.machine.pid()];
        faults.fail_all(&main_thread, true)?;
        let set = set_pam(&mut guest.machine.qmp, READABLE);
        let missing = number(guest, "dma-missing");
        let over = faults.are_over();
        faults.fail_all(&main_thread, false)?;
        set?;
        scenario.check_equal(
            (missing?, over?),
            (0, true),
            format!(
                "what the device lacks when {count} allocations have failed, and whether they have"
            ),
        )?;
        has_all_again(scenario, guest, mapped)?;
        set_pam(&mut guest.machine.qmp, RAM)?;
        has_all_again(scenario, guest, mapped)?;
    }
    Ok(())
}

/// Private and back as a whole: one area.
fn join_at_the_bios(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let (start, bytes) = (BIOS - 4 * PAGE, 8 * PAGE);
    guest.convert(scenario, start, bytes, true)?;
    guest.convert(scenario, start, bytes, false)
}

/// Of what is to be shown to the device all but a little is, and how much that is is known. Beside what the host refused it is
/// small windows that became part of a large one.
fn lacks(scenario: &Scenario, guest: &mut Confidential, shown: u64) -> Result<u64, Failure> {
    let (missing, mapped) = (number(guest, "dma-missing")?, number(guest, "dma-mapped")?);
    scenario.check(
        missing < MIB && mapped + missing == shown,
        format!("of {shown:#x} bytes {mapped:#x} are mapped for the device and {missing:#x} are known to be missing"),
    )?;
    Ok(missing)
}

fn has_all_again(scenario: &Scenario, guest: &mut Confidential, mapped: u64) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    while number(guest, "dma-missing")? != 0 {
        if Instant::now() > deadline {
            return Err(Failure::new(
                "QEMU does not try again what the host refused",
            ));
        }
        thread::sleep(Duration::from_millis(50));
    }
    scenario.check_equal(
        number(guest, "dma-mapped")?,
        mapped,
        "query-gmem's dma-mapped when devices lack nothing",
    )?;
    Engine::new(0, ORIGIN).reaches(scenario, guest, SHARED)
}

fn number(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .number(name)
}

const SELECT: &str = "o/w 0xcf8 0x80000090";

fn pam(qmp: &mut Qmp) -> Result<u64, Failure> {
    qmp.human(SELECT)?;
    let answer = qmp.human("i/b 0xcfc")?;
    let digits = answer.split_ascii_whitespace().last().unwrap_or_default();
    u64::from_str_radix(digits.trim_start_matches("0x"), 16)
        .map_err(|_| Failure::new(format!("no PAM register: {answer}")))
}

/// What QEMU says to it, which goes to the monitor that asked.
fn set_pam(qmp: &mut Qmp, value: u64) -> Result<String, Failure> {
    qmp.human(SELECT)?;
    qmp.human(&format!("o/b 0xcfc {value:#x}"))
}
