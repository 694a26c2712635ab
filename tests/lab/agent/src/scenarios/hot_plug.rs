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
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
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

/// The ports of the chipset's PCI hot-plug controller (ACPI) that select a bus and eject from it. A guest's driver would
/// write there; the monitor does, so that the device goes while the guest is in the middle of something else.
const SELECT: u64 = 0xcd0;
const EJECT: u64 = 0xcc8;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let [one, two] = two_to_vfio(&EDU)?;
    let mut guest = Confidential::with_one_block(
        scenario.directory(),
        RAM_BYTES,
        "",
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
    guest.convert(scenario, PRIVATE, PRIVATE_BYTES, true)?;
    guest.fill(PRIVATE, PRIVATE_BYTES, 3)?;
    guest.agree(scenario, "before any device")?;

    let port0 = Port("port0", "edu0");
    let port1 = Port("port1", "edu1");
    scenario.prefix("without memory: ");
    fails_to_plug(scenario, &mut guest, &port0, &one)?;
    scenario.prefix("first device: ");
    port0.plug(scenario, &mut guest, &one, "iommufd0", 1)?;
    reaches_only_shared(scenario, &mut guest, 0)?;

    scenario.prefix("second device, same address space: ");
    port1.plug(scenario, &mut guest, &two, "iommufd0", 1)?;
    reaches_only_shared(scenario, &mut guest, 0)?;
    reaches_only_shared(scenario, &mut guest, 1)?;

    scenario.prefix("first device gone: ");
    port0.unplug(scenario, &mut guest, 1)?;
    reaches_only_shared(scenario, &mut guest, 0)?;

    scenario.prefix("first device back, address space of its own: ");
    port0.plug(scenario, &mut guest, &one, "iommufd1", 2)?;
    reaches_only_shared(scenario, &mut guest, 0)?;
    reaches_only_shared(scenario, &mut guest, 1)?;

    scenario.prefix("both gone: ");
    port1.unplug(scenario, &mut guest, 1)?;
    port0.unplug(scenario, &mut guest, 0)?;
    guest.agree(scenario, "after the last device")?;

    scenario.prefix("first device once more: ");
    port0.plug(scenario, &mut guest, &one, "iommufd0", 1)?;
    reaches_only_shared(scenario, &mut guest, 0)?;
    scenario.prefix("");
    guest.convert(scenario, PRIVATE, PRIVATE_BYTES, false)?;
    guest.expect_fresh(scenario, PRIVATE, PRIVATE_BYTES)?;
    Engine::new(0, ORIGIN).reaches(scenario, &mut guest, PRIVATE + 7 * PAGE)?;
    guest.agree(scenario, "all shared again")?;
    scenario.fact("agreements", guest.agreements);
    guest.finish(scenario)
}

/// A root port, and the device in it.
struct Port(&'static str, &'static str);

impl Port {
    fn plug(
        &self,
        scenario: &mut Scenario,
        guest: &mut Confidential,
        host: &str,
        iommufd: &str,
        spaces: u64,
    ) -> Outcome {
        let flips = begin(guest)?;
        let before = requests(guest)?;
        guest.machine.qmp.execute(
            "device_add",
            json!({
                "driver": "vfio-pci", "id": self.1, "bus": self.0,
                "host": host, "iommufd": iommufd,
            }),
        )?;
        let during = requests(guest)? - before;
        end(scenario, guest, flips, during, "plugging")?;
        follows(scenario, guest, spaces)
    }

    fn unplug(&self, scenario: &mut Scenario, guest: &mut Confidential, spaces: u64) -> Outcome {
        let flips = begin(guest)?;
        let before = requests(guest)?;
        self.remove(guest)?;
        let during = requests(guest)? - before;
        end(scenario, guest, flips, during, "unplugging")?;
        follows(scenario, guest, spaces)
    }

    /// Returns when the device is gone.
    fn remove(&self, guest: &mut Confidential) -> Outcome {
        guest
            .machine
            .qmp
            .execute("device_del", json!({"id": self.1}))?;
        let bus = guest.machine.qmp.execute(
            "qom-get",
            json!({
                "path": format!("/machine/peripheral/{0}/{0}", self.0),
                "property": "acpi-pcihp-bsel",
            }),
        )?;
        for write in [format!("o /4 {SELECT} {bus}"), format!("o /4 {EJECT} 1")] {
            let arguments = json!({"command-line": write});
            guest
                .machine
                .qmp
                .execute("human-monitor-command", arguments)?;
        }
        guest.machine.qmp.event("DEVICE_DELETED", GONE_PATIENCE)?;
        Ok(())
    }
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
        let answer = guest.machine.qmp.try_execute(
            "device_add",
            json!({
                "driver": "vfio-pci", "id": port.1, "bus": port.0,
                "host": host, "iommufd": "iommufd0",
            }),
        )?;
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
                port.remove(guest)?;
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
