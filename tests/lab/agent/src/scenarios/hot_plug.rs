// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices come to a running confidential guest and go again while it converts memory: each reaches what is shared and
//! nothing that is private, whether it shares an address space with another device or has one of its own.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::{all_done, Engine};
use crate::failure::Failure;
use crate::host::faults::Faults;
use crate::host::passthrough::{two_to_vfio, EDU};
use crate::ledger::PAGE;
use crate::monitor::Begun;
use crate::plugging::Port;
use crate::qmp::Gmem;
use crate::release::Release;
use crate::scenario::{Outcome, Scenario};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
const ORIGIN: u64 = 16 * MIB;
const SHARED: u64 = 24 * MIB;
const ELSEWHERE: u64 = 25 * MIB;
const PRIVATE: u64 = 32 * MIB;
const PRIVATE_BYTES: u64 = 2 * MIB;
/// Where pages go private and back while devices come and go.
const FLIPPED: u64 = 64 * MIB;
const PLACES: u64 = 256;
const FLIPS: u64 = 1500;
const GONE_PATIENCE: Duration = Duration::from_secs(60);

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let release = scenario.release();
    let [one, two] = two_to_vfio(&EDU)?;
    let mut guest = Confidential::with_one_block(
        scenario.directory(),
        RAM_BYTES,
        release.property(),
        &[
            "-device",
            "pcie-root-port,id=port0,chassis=1",
            "-device",
            "pcie-root-port,id=port1,chassis=2",
            "-object",
            "iommufd,id=iommufd0",
            "-object",
            "iommufd,id=iommufd1",
        ],
    )?;
    guest.patient = release != Release::Late;
    guest.convert(scenario, PRIVATE, PRIVATE_BYTES, true)?;
    guest.fill(PRIVATE, PRIVATE_BYTES, 3)?;
    guest.agree(scenario, "before any device")?;

    let [port0, port1] =
        [("port0", "edu0"), ("port1", "edu1")].map(|(bus, device)| Port { bus, device });
    // The rest is the same however long the memory of converted pages is kept.
    let whole = release == Release::Soon;
    if whole {
        scenario.prefix("without memory: ");
        fails_to_plug(scenario, &mut guest, &port0, &one)?;
    }
    scenario.prefix("first device: ");
    plug(scenario, &mut guest, &port0, &one, "iommufd0", 1)?;
    reaches_only_shared(scenario, &mut guest, 0)?;

    scenario.prefix("second device, same address space: ");
    plug(scenario, &mut guest, &port1, &two, "iommufd0", 1)?;
    reaches_only_shared(scenario, &mut guest, 0)?;
    reaches_only_shared(scenario, &mut guest, 1)?;

    scenario.prefix("first device gone: ");
    unplug(scenario, &mut guest, &port0, 1)?;
    reaches_only_shared(scenario, &mut guest, 0)?;

    if whole {
        scenario.prefix("first device back, address space of its own: ");
        plug(scenario, &mut guest, &port0, &one, "iommufd1", 2)?;
        reaches_only_shared(scenario, &mut guest, 0)?;
        reaches_only_shared(scenario, &mut guest, 1)?;

        scenario.prefix("both gone: ");
        unplug(scenario, &mut guest, &port1, 1)?;
        unplug(scenario, &mut guest, &port0, 0)?;
        guest.agree(scenario, "after the last device")?;

        scenario.prefix("first device once more: ");
        plug(scenario, &mut guest, &port0, &one, "iommufd0", 1)?;
        reaches_only_shared(scenario, &mut guest, 0)?;
    }
    scenario.prefix("");
    guest.convert(scenario, PRIVATE, PRIVATE_BYTES, false)?;
    guest.expect_fresh(scenario, PRIVATE, PRIVATE_BYTES)?;
    Engine::new(0, ORIGIN).reaches(scenario, &mut guest, PRIVATE + 7 * PAGE)?;
    guest.agree(scenario, "all shared again")?;
    scenario.fact("agreements", guest.agreements);
    guest.finish(scenario)
}

fn plug(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    port: &Port,
    host: &str,
    iommufd: &str,
    spaces: u64,
) -> Outcome {
    let flips = begin(guest)?;
    let before = requests(guest)?;
    port.plug(guest, host, iommufd)?;
    let during = requests(guest)? - before;
    end(scenario, guest, flips, during, "plugging")?;
    follows(scenario, guest, spaces)
}

fn unplug(scenario: &mut Scenario, guest: &mut Confidential, port: &Port, spaces: u64) -> Outcome {
    let flips = begin(guest)?;
    let before = requests(guest)?;
    port.unplug(guest)?;
    let during = requests(guest)? - before;
    end(scenario, guest, flips, during, "unplugging")?;
    follows(scenario, guest, spaces)
}

/// Single allocations of iommufd's fail while a device is plugged in, further and further on. Where it is refused
/// nothing of it is left; where the kernel does without, it goes again.
fn fails_to_plug(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    port: &Port,
    host: &str,
) -> Outcome {
    let faults = Faults::under("iommufd_fops_ioctl")?;
    let main_thread = guest.machine.pid();
    let (mut refused, mut plugged) = (0, 0);
    for number in [1, 2, 3, 5, 8, 13, 21, 34, 55, 89] {
        faults.fail_nth(main_thread, number)?;
        let answer = port.try_plug(guest, host, "iommufd0")?;
        let failed = faults.failed(main_thread)?;
        match answer {
            Err(refusal) => {
                scenario.check(
                    failed,
                    format!("a device is refused for want of memory only: {refusal:?}"),
                )?;
                refused += 1;
            }
            Ok(_) => {
                plugged += 1;
                port.unplug(guest)?;
            }
        }
        follows(scenario, guest, 0)?;
        if !failed {
            break;
        }
    }
    scenario.fact("devices refused", refused);
    scenario.fact("devices plugged in all the same", plugged);
    scenario.check(refused > 0, "an allocation that fails is noticed")?;
    guest.agree(scenario, "after devices that were refused")
}

pub(super) fn requests(guest: &mut Confidential) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?.total("requests")
}

/// Returns when the guest is at it.
pub(super) fn begin(guest: &mut Confidential) -> Result<Begun, Failure> {
    let before = requests(guest)?;
    let flips = guest
        .monitor
        .begin_flip(FLIPS, FLIPPED, PAGE, 2 * PAGE, PLACES)?;
    let deadline = Instant::now() + GONE_PATIENCE;
    while requests(guest)? == before {
        if Instant::now() > deadline {
            return Err(Failure::new("the guest does not begin to convert"));
        }
    }
    Ok(flips)
}

pub(super) fn end(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    flips: Begun,
    during: u64,
    what: &str,
) -> Outcome {
    let results = guest.monitor.end_flip(flips)?;
    let all = all_done(scenario, &results, what)?;
    for place in 0..PLACES {
        for private in [true, false] {
            let at = FLIPPED + 2 * place * PAGE;
            guest.ledger.convert(at, PAGE, private);
        }
    }
    scenario.check_equal(all, 2 * FLIPS, format!("{what}: requests answered"))?;
    scenario.fact("conversions meanwhile", during);
    scenario.check(
        during > 0,
        format!("{what}: the guest converted memory meanwhile"),
    )?;
    scenario.progress(format!("{what}: {during} conversions meanwhile"));
    Ok(())
}

/// QEMU says that `spaces` address spaces show what is shared.
fn follows(scenario: &mut Scenario, guest: &mut Confidential, spaces: u64) -> Outcome {
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    let block = gmem.block("ram0")?;
    for name in ["dma-windows", "dma-mapped", "dma-areas"] {
        scenario.fact(name, block.number(name)?);
    }
    scenario.check_equal(
        block.number("quarantined")?,
        0,
        "query-gmem's quarantined bytes",
    )?;
    scenario.check_equal(
        block.number("dma-mapped")?,
        spaces * block.number("shared")?,
        "bytes mapped for devices, all address spaces together",
    )
}

fn reaches_only_shared(scenario: &mut Scenario, guest: &mut Confidential, index: u64) -> Outcome {
    let engine = Engine::new(index, ORIGIN);
    engine.reaches(scenario, guest, SHARED)?;
    // One of the pages that were private a moment ago.
    engine.reaches(scenario, guest, FLIPPED + 2 * PAGE)?;
    let fault = engine.is_kept_from(scenario, guest, PRIVATE + (index + 5) * PAGE, ELSEWHERE)?;
    scenario.fact(&format!("device {index}, fault at a private page"), fault);
    Ok(())
}
