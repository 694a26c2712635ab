// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest whose RAM starts private, as that of TDX and SNP guests does, but for the range from which it issues its
//! hypercalls. No firmware runs; what QEMU put into private pages before the start is there and runs, and is put there
//! again at each reset. The host reads none of it.

use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::messages::Messages;
use crate::host::passthrough::{to_vfio, EDU};
use crate::host::shared_pages::SharedPages;
use crate::ledger::PAGE;
use crate::machine::Machine;
use crate::monitor::protocol::pattern;
use crate::monitor::Monitor;
use crate::place;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
/// The payload's own memory.
const OPEN: u64 = 2 * MIB;
const OPEN_BYTES: u64 = 2 * MIB;
/// Code and what it sums up, in private pages.
const IMAGE: u64 = 8 * MIB;
const DATA: u64 = IMAGE + PAGE;
const DATA_BYTES: u64 = 64 * PAGE;
const DATA_SEED: u64 = 7;
const RANGE: u64 = 32 * MIB;
const RANGE_BYTES: u64 = 16 * PAGE;
const TARGET: u64 = RANGE + 5 * PAGE;
const FAULT_PATIENCE: Duration = Duration::from_secs(30);
const EXIT_PATIENCE: Duration = Duration::from_secs(120);

struct Guest {
    machine: Machine,
    monitor: Monitor,
    pages: SharedPages,
}

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&EDU)?;
    // Not among the logs, which a failure shows.
    let image = std::env::temp_dir().join("placed-image");
    fs::write(&image, placed()).attempt(|| format!("writing {}", image.display()))?;
    let mut guest = start(scenario, &image, &device)?;
    scenario.prefix("at start: ");
    as_after_a_start(scenario, &mut guest)?;
    scenario.prefix("");
    device_reaches_what_was_shared(scenario, &mut guest)?;

    guest.machine.qmp.execute("system_reset", json!({}))?;
    guest.monitor.wait_until_ready()?;
    scenario.prefix("after a reset: ");
    as_after_a_start(scenario, &mut guest)?;
    scenario.prefix("");
    device_reaches_what_was_shared(scenario, &mut guest)?;

    guest.monitor.power_off()?;
    guest.machine.wait_for_exit(EXIT_PATIENCE)
}

fn start(scenario: &Scenario, image: &Path, device: &str) -> Result<Guest, Failure> {
    let loader = format!(
        "loader,file={},addr={IMAGE:#x},force-raw=on",
        image.display()
    );
    let (machine, serial) = Machine::start(
        scenario.directory(),
        &[
            "-object",
            &format!(
                "sw-protected-guest,id=cgs0,ram=private,shared-base={OPEN},shared-size={OPEN_BYTES},image={}",
                place::payload()
            ),
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}"),
            "-m",
            &format!("{}M", RAM_BYTES / MIB),
            "-machine",
            "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0",
            "-device",
            &loader,
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            &format!("vfio-pci,host={device},iommufd=iommufd0"),
        ],
    )?;
    let mut monitor = Monitor::new(serial)?;
    monitor.ask("ping")?;
    machine.is_silent()?;
    let pages = SharedPages::of(machine.pid(), RAM_BYTES)?;
    Ok(Guest {
        machine,
        monitor,
        pages,
    })
}

/// A function of one number, and the words behind its page: it returns their sum and the number. It computes and reads
/// memory and no more, which is what code in private pages can do here.
fn placed() -> Vec<u8> {
    let words = (DATA_BYTES / 8) as u32;
    let to_data = (PAGE - 9) as u32;
    let mut bytes = vec![0x31, 0xc0]; // xor eax, eax
    bytes.extend([0x48, 0x8d, 0x35]); // lea rsi, [rip + to_data]
    bytes.extend(to_data.to_le_bytes());
    bytes.push(0xb9); // mov ecx, words
    bytes.extend(words.to_le_bytes());
    bytes.extend([0x48, 0x03, 0x06]); // again: add rax, [rsi]
    bytes.extend([0x48, 0x83, 0xc6, 0x08]); // add rsi, 8
    bytes.extend([0xff, 0xc9, 0x75, 0xf5]); // dec ecx; jnz again
    bytes.extend([0x48, 0x01, 0xf8, 0xc3]); // add rax, rdi; ret
    bytes.resize(PAGE as usize, 0xcc);
    bytes.extend(data().flat_map(u64::to_le_bytes));
    bytes
}

fn data() -> impl Iterator<Item = u64> {
    (DATA..DATA + DATA_BYTES)
        .step_by(8)
        .map(|at| pattern(DATA_SEED, at))
}

fn number(guest: &mut Guest, name: &str) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .number(name)
}

/// All is private but the range; what was placed is there; the host sees none of it.
fn as_after_a_start(scenario: &mut Scenario, guest: &mut Guest) -> Outcome {
    for (name, expected) in [
        ("private", RAM_BYTES - OPEN_BYTES),
        ("shared", OPEN_BYTES),
        ("dma-mapped", OPEN_BYTES),
    ] {
        let found = number(guest, name)?;
        scenario.fact(name, found);
        scenario.check_equal(found, expected, format!("query-gmem's {name}"))?;
    }
    let sum = data().fold(0, u64::wrapping_add);
    for argument in [0, 5] {
        let result = guest.monitor.call(IMAGE, argument)?;
        scenario.check_equal(
            result,
            sum.wrapping_add(argument),
            "what the code in private pages returns",
        )?;
    }
    let difference = guest.monitor.check(DATA, DATA_BYTES, DATA_SEED)?;
    scenario.check_equal(difference, None, "placed bytes, as the guest reads them")?;
    scenario.fact("placed in private pages", "runs, and reads its data");

    for offset in [0, IMAGE, DATA, RANGE, RAM_BYTES - PAGE] {
        let refusal = guest.pages.refusal(offset);
        scenario.check(
            refusal.is_some(),
            format!("the host can't read the private page at {offset:#x}"),
        )?;
        scenario.fact("the host reads a private page", refusal);
    }
    let refusal = guest.pages.refusal(OPEN);
    scenario.check_equal(refusal, None, "how the host is refused the shared range")?;

    // Private memory that nobody placed anything in is ordinary memory, and the next reset makes the image anew.
    guest.monitor.fill(64 * MIB, MIB, 2)?;
    let difference = guest.monitor.check(64 * MIB, MIB, 2)?;
    scenario.check_equal(difference, None, "private memory, as the guest reads it")?;
    guest.monitor.fill(DATA, DATA_BYTES, 8)
}

/// A range becomes shared for the device and private again.
fn device_reaches_what_was_shared(scenario: &mut Scenario, guest: &mut Guest) -> Outcome {
    const SEED: u64 = 3;
    const SECRET: u64 = 4;
    let result = guest.monitor.convert(RANGE, RANGE_BYTES, false)?;
    scenario.check_equal(result, 0, "result of to-shared")?;
    scenario.check_equal(
        number(guest, "dma-mapped")?,
        OPEN_BYTES + RANGE_BYTES,
        "bytes mapped for the device",
    )?;
    guest.monitor.fill(RANGE, PAGE, SEED)?;
    guest.monitor.zero(TARGET, PAGE)?;
    guest.monitor.edu_load(RANGE)?;
    guest.monitor.edu_store(TARGET)?;
    let difference = guest.monitor.check_copy(TARGET, PAGE, SEED, RANGE)?;
    scenario.check_equal(difference, None, "DMA to what became shared arrives")?;
    let mut seen = [0; PAGE as usize];
    guest
        .pages
        .read(&mut seen, TARGET)
        .attempt(|| "reading a shared page as the host".into())?;
    let same = seen
        .chunks_exact(8)
        .zip((RANGE..).step_by(8))
        .all(|(word, at)| word == pattern(SEED, at).to_le_bytes());
    scenario.check(same, "the host sees the bytes of the shared page")?;
    scenario.fact("DMA to what became shared", "arrives");

    let mut messages = Messages::from_now()?;
    let result = guest.monitor.convert(RANGE, RANGE_BYTES, true)?;
    scenario.check_equal(result, 0, "result of to-private")?;
    guest.monitor.fill(RANGE, RANGE_BYTES, SECRET)?;
    guest.monitor.edu_store(TARGET)?;
    let difference = guest.monitor.check(RANGE, RANGE_BYTES, SECRET)?;
    scenario.check_equal(difference, None, "DMA leaves private pages untouched")?;
    let fault = messages.find(&["DMAR", &format!("{TARGET:#x}")], FAULT_PATIENCE)?;
    scenario.check(
        fault.is_some(),
        "the IOMMU reports a fault at the private page",
    )?;
    scenario.fact("DMA to what is private again", fault);
    scenario.check_equal(
        number(guest, "private")?,
        RAM_BYTES - OPEN_BYTES,
        "query-gmem's private at the end",
    )
}
