// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages inside a large range that a device can reach go private and back all the time, while the device writes their
//! neighbours. With `cut` no write is lost and the IOMMU reports nothing; with `unit` the moments in which neighbours
//! are out are counted; where cutting does not work, QEMU says so and takes another way.

use crate::boot::CommandLine;
use crate::confidential::{many_runs, Confidential};
use crate::dma::{all_done, Engine};
use crate::failure::{Attempt, Failure};
use crate::host::faults::Faults;
use crate::host::memory::threads;
use crate::host::messages::Messages;
use crate::host::passthrough::{to_vfio, EDU};
use crate::host::tracing::{Ioctls, IOMMU_VFIO_IOAS, VFIO_IOMMU_UNMAP_DMA};
use crate::ledger::PAGE;
use crate::qmp::Gmem;
use crate::release::Release;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
const ORIGIN: u64 = 16 * MIB;
const ELSEWHERE: u64 = 17 * MIB;
const RANGE: u64 = 32 * MIB;
const RANGE_BYTES: u64 = 32 * MIB;
const UNIT: u64 = 2 * MIB;
/// In the middle of the range and of a unit.
const PAGE_IN_RANGE: u64 = RANGE + 15 * MIB;
/// Each write takes the device 100 ms, and the guest converts all that time.
const TRIALS: u64 = 60;
/// Where how the memory of pages is kept is what matters.
const FEW_TRIALS: u64 = 10;
/// The library tries a cut on scratch pages, which no counter of guest memory has.
const TRIAL: u64 = 1;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&EDU)?;
    let release = scenario.release();
    if release != Release::Soon {
        return cut(scenario, &device, release, FEW_TRIALS);
    }
    scenario.prefix("cut: ");
    cut(scenario, &device, release, TRIALS)?;
    scenario.prefix("unit: ");
    unit(scenario, &device)?;
    scenario.prefix("no cuts possible: ");
    no_cuts(scenario, &device)
}

fn start(
    scenario: &Scenario,
    name: &str,
    properties: &str,
    more: &[&str],
) -> Result<Confidential, Failure> {
    let mut arguments = vec!["-object", "iommufd,id=iommufd0"];
    arguments.extend(more);
    let directory = scenario.directory().join(name);
    let properties = format!("{properties}{}", many_runs());
    Confidential::with_one_block(&directory, RAM_BYTES, &properties, &arguments)
}

fn number(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .number(name)
}

fn strategy(guest: &mut Confidential) -> Result<String, Failure> {
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    Ok(gmem.block("ram0")?.text("dma-strategy")?.to_string())
}

/// The range goes private and comes back as a whole: from then on it is one area.
fn in_one_piece(scenario: &Scenario, guest: &mut Confidential) -> Result<u64, Failure> {
    guest.convert(scenario, RANGE, RANGE_BYTES, true)?;
    guest.convert(scenario, RANGE, RANGE_BYTES, false)?;
    number(guest, "dma-areas")
}

fn beside_dma(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    trials: u64,
) -> Result<(u64, u64), Failure> {
    let mut messages = Messages::from_now()?;
    let cuts = number(guest, "cut-calls")?;
    let windows = number(guest, "remap-windows")?;
    let places = RANGE_BYTES / (2 * PAGE);
    let seen = guest
        .monitor
        .flip_beside_dma(trials, RANGE, places, ORIGIN, 0)?;
    let conversions = all_done(scenario, &seen.results, "beside DMA")?;
    let faults = messages.count(&["DMAR", "fault addr"])?;
    scenario.fact("writes beside the page", trials);
    scenario.fact("conversions meanwhile", conversions);
    scenario.fact("lost writes", seen.lost);
    scenario.fact("wrong words", seen.wrong_words);
    scenario.fact("IOMMU faults", faults);
    scenario.check(
        conversions >= 2 * trials,
        format!("there were conversions during each write: {conversions} in all"),
    )?;
    scenario.progress(format!("{trials} writes during {conversions} conversions"));
    for (name, before) in [("cut-calls", cuts), ("remap-windows", windows)] {
        let during = number(guest, name)? - before;
        scenario.fact(&format!("{name} meanwhile"), during);
    }
    for private in [true, false] {
        guest.ledger.convert(RANGE, RANGE_BYTES, private);
    }
    Ok((seen.lost, faults))
}

fn cut(scenario: &mut Scenario, device: &str, release: Release, trials: u64) -> Outcome {
    let ioctls = Ioctls::start()?;
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    let mut guest = start(
        scenario,
        "cut",
        release.property(),
        &["-device", &passthrough],
    )?;
    let chosen = strategy(&mut guest)?;
    scenario.fact("strategy", chosen.as_str());
    scenario.check_equal(chosen.as_str(), "cut", "the strategy that auto chooses")?;
    let areas = in_one_piece(scenario, &mut guest)?;
    scenario.fact("areas with the range in one", areas);

    let cuts = number(&mut guest, "cut-calls")?;
    let (lost, faults) = beside_dma(scenario, &mut guest, trials)?;
    let cuts = number(&mut guest, "cut-calls")? - cuts;
    scenario.check(
        cuts > trials,
        format!("neighbours were really cut apart: {cuts} cuts in {trials} writes"),
    )?;
    scenario.check_equal(lost, 0, "lost writes to neighbours")?;
    scenario.check_equal(faults, 0, "IOMMU faults")?;
    scenario.check_equal(
        number(&mut guest, "remap-windows")?,
        0,
        "moments in which neighbours were out",
    )?;

    let again = in_one_piece(scenario, &mut guest)?;
    scenario.check_equal(again, areas, "areas after the whole range was private once")?;

    let engine = Engine::new(0, ORIGIN);
    guest.convert(scenario, PAGE_IN_RANGE, PAGE, true)?;
    let fault = engine.is_kept_from(scenario, &mut guest, PAGE_IN_RANGE, ELSEWHERE)?;
    scenario.fact("fault at the private page", fault);
    for neighbour in [PAGE_IN_RANGE - PAGE, PAGE_IN_RANGE + PAGE] {
        engine.reaches(scenario, &mut guest, neighbour)?;
    }
    guest.agree(scenario, "page private")?;
    guest.convert(scenario, PAGE_IN_RANGE, PAGE, false)?;
    engine.reaches(scenario, &mut guest, PAGE_IN_RANGE)?;
    guest.agree(scenario, "page shared again")?;
    let apart = number(&mut guest, "dma-areas")?;
    scenario.fact("areas with the page cut out and back", apart);
    scenario.check_equal(apart, areas + 2, "areas with the page cut out and back")?;

    let calls = ioctls.by_command(&threads(guest.machine.pid())?)?;
    let count = |command| calls.get(&command).copied().unwrap_or(0);
    for (name, command) in [
        ("cut-calls", VFIO_IOMMU_UNMAP_DMA),
        ("set-calls", IOMMU_VFIO_IOAS),
    ] {
        let said = number(&mut guest, name)?;
        scenario.fact(name, said);
        scenario.check_equal(
            count(command),
            said + TRIAL,
            format!("{name} by the kernel's count and by query-gmem, with the trial at the start"),
        )?;
    }
    guest.finish(scenario)
}

fn unit(scenario: &mut Scenario, device: &str) -> Outcome {
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    let mut guest = start(
        scenario,
        "unit",
        &format!(",dma-split=unit,dma-unit={UNIT}"),
        &["-device", &passthrough],
    )?;
    scenario.check_equal(strategy(&mut guest)?.as_str(), "unit", "the strategy")?;
    in_one_piece(scenario, &mut guest)?;
    // One page of each unit: the rest of the unit is out for a moment, once.
    let before = number(&mut guest, "remap-windows")?;
    let units = RANGE_BYTES / UNIT;
    let flips = guest
        .monitor
        .begin_flip(units, RANGE + PAGE, PAGE, UNIT, units)?;
    all_done(scenario, &guest.monitor.end_flip(flips)?, "a page per unit")?;
    let windows = number(&mut guest, "remap-windows")? - before;
    scenario.fact("moments in which neighbours were out", windows);
    scenario.check_equal(windows, units, "moments in which neighbours were out")?;
    scenario.check_equal(
        number(&mut guest, "dma-mapped")?,
        RAM_BYTES,
        "bytes mapped afterwards",
    )?;
    in_one_piece(scenario, &mut guest)?;
    beside_dma(scenario, &mut guest, TRIALS)?;

    let engine = Engine::new(0, ORIGIN);
    guest.convert(scenario, PAGE_IN_RANGE, PAGE, true)?;
    engine.is_kept_from(scenario, &mut guest, PAGE_IN_RANGE, ELSEWHERE)?;
    for neighbour in [PAGE_IN_RANGE - PAGE, PAGE_IN_RANGE + PAGE] {
        engine.reaches(scenario, &mut guest, neighbour)?;
    }
    guest.agree(scenario, "page private")?;
    guest.finish(scenario)
}

/// Each allocation that the kernel makes for a cut fails while the device is plugged in: the trial at that moment finds
/// it out. Where nothing else is allowed the device is refused.
fn no_cuts(scenario: &mut Scenario, device: &str) -> Outcome {
    for (split, expected) in [
        ("auto", Some("page")),
        ("auto,dma-unit=2M", Some("unit")),
        ("cut", None),
    ] {
        let properties = format!(",dma-split={split}");
        let port = ["-device", "pcie-root-port,id=port0,chassis=1"];
        let name = format!("no-cuts-{}", &split[..split.len().min(5)]);
        let mut guest = start(scenario, &name, &properties, &port)?;
        let faults = Faults::under("iopt_cut_iova")?;
        let threads = threads(guest.machine.pid())?;
        faults.fail_all(&threads, true)?;
        let answer = guest.machine.qmp.try_execute(
            "device_add",
            json!({
                "driver": "vfio-pci", "id": "edu0", "bus": "port0",
                "host": device, "iommufd": "iommufd0",
            }),
        )?;
        faults.fail_all(&threads, false)?;
        match (expected, answer) {
            (Some(expected), Ok(_)) => {
                scenario.check_equal(strategy(&mut guest)?.as_str(), expected, "the strategy")?;
                let complaints = guest.machine.complaints();
                let reason = complaints
                    .lines()
                    .find(|line| line.contains("instead of cut"))
                    .attempt(|| format!("QEMU does not say why it does not cut: {complaints}"))?;
                scenario.fact(&format!("dma-split={split}"), reason.trim());
                let engine = Engine::new(0, ORIGIN);
                guest.convert(scenario, PAGE_IN_RANGE, PAGE, true)?;
                engine.is_kept_from(scenario, &mut guest, PAGE_IN_RANGE, ELSEWHERE)?;
                engine.reaches(scenario, &mut guest, PAGE_IN_RANGE + PAGE)?;
            }
            (None, Err(refusal)) => {
                scenario.fact(&format!("dma-split={split}"), refusal.description);
                guest.convert(scenario, PAGE_IN_RANGE, PAGE, true)?;
                guest.fill(PAGE_IN_RANGE, PAGE, 5)?;
            }
            (_, answer) => scenario.check(
                false,
                format!("dma-split={split} is answered as it should be, not by {answer:?}"),
            )?,
        }
        guest.agree(scenario, "device or no device")?;
        guest.finish(scenario)?;
    }
    Ok(())
}
