// SPDX-License-Identifier: MIT OR Apache-2.0
//! direct-map=off. Where the kernel can't, it is refused with a sentence before the guest starts. Where it can, a confidential
//! guest runs and converts, and whoever would have to pin its memory is refused: a device, the host that looks at it, a disk
//! with O_DIRECT, the kernel's vhost where it sends without a copy.

use super::vhost_net::vhost_devices_fail;
use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Attempt;
use crate::host::files;
use crate::host::kernel;
use crate::host::passthrough::{to_vfio, EDU};
use crate::host::pins::Ring;
use crate::host::shared_pages::SharedPages;
use crate::ledger::PAGE;
use crate::machine::Machine;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::fs::{self, File};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
const START: u64 = 16 * MIB;
const BYTES: u64 = 4 * MIB;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    match kernel::no_direct_map() {
        true => offered(scenario),
        false => not_offered(scenario),
    }
}

fn not_offered(scenario: &mut Scenario) -> Outcome {
    let said = Machine::refusal(
        scenario.directory(),
        &[
            "-object",
            "memory-backend-gmem,id=ram0,size=64M,direct-map=off",
            "-m",
            "64M",
            "-machine",
            "q35,accel=kvm,smm=off,memory-backend=ram0",
        ],
    )?;
    scenario.fact("direct-map=off", said.clone());
    scenario.check(
        said.contains("direct-map") || said.contains("direct map"),
        format!("the refusal names the property: {said}"),
    )
}

fn offered(scenario: &mut Scenario) -> Outcome {
    // The guests are offered a kvm-clock; what is said where they can't have one is a scenario of its own.
    let _clock = kernel::PfnCache::by_file(true)?;
    let device = to_vfio(&EDU)?;
    let mut guest = Confidential::with_one_block(
        scenario.directory(),
        RAM_BYTES,
        ",direct-map=off",
        &[
            "-device",
            "pcie-root-port,id=port0,chassis=1",
            "-object",
            "iommufd,id=iommufd0",
        ],
    )?;
    for (private, seed) in [(true, 1), (false, 2), (true, 3), (false, 4)] {
        guest.convert(scenario, START, BYTES, private)?;
        guest.fill(START, BYTES, seed)?;
        let difference = guest.monitor.check(START, BYTES, seed)?;
        scenario.check_equal(
            difference,
            None,
            "the guest finds what it wrote after a conversion",
        )?;
    }
    scenario.fact("direct-map=off", "the guest runs and converts");

    // It is shared, and QEMU reads it by its own mapping; another process has to pin it.
    let seen = guest.shared[0].try_read(&mut [0; PAGE as usize], START);
    scenario.fact(
        "the host reads a shared page through /proc/PID/mem",
        seen.as_ref()
            .map_or_else(|error| error.to_string(), |()| "it can".into()),
    );
    scenario.check(seen.is_err(), "no page of the guest can be pinned")?;

    let answer = guest.machine.qmp.try_execute(
        "device_add",
        json!({
            "driver": "vfio-pci", "id": "edu0", "bus": "port0",
            "host": device, "iommufd": "iommufd0",
        }),
    )?;
    match answer {
        Ok(answer) => {
            scenario.check(false, format!("a device is refused (it answered {answer})"))?
        }
        Err(refusal) => {
            scenario.fact("a device to pass through", refusal.description.clone());
            scenario.check(
                refusal.description.contains("direct-map")
                    || refusal.description.contains("direct map"),
                format!("the refusal names the property: {}", refusal.description),
            )?;
        }
    }
    others_who_pin(scenario, &mut guest)?;
    guest.monitor.ask("ping")?;
    guest.finish(scenario)?;
    who_failed_pins_nothing(scenario)
}

/// What the host's kernel is told at its start in this mode, so that its vhost sends from guest memory as it is.
const ZERO_COPY: &str = "/sys/module/vhost_net/parameters/experimental_zcopytx";

fn vhost_is_refused(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let zero_copy = fs::read_to_string(ZERO_COPY).attempt(|| format!("reading {ZERO_COPY}"))?;
    scenario.check_equal(zero_copy.trim(), "1", "vhost_net sends without a copy here")?;
    let said = files::refused_for_good(
        scenario,
        &mut guest.machine,
        "netdev_add",
        &json!({
            "type": "tap", "id": "net0", "ifname": "tap0", "script": "no", "downscript": "no", "vhost": true,
        }),
    )?;
    for part in ["zero-copy", "direct-map=off", "vhost=off"] {
        scenario.check(
            said.contains(part),
            format!("the refusal of vhost with zero-copy names {part}: {said}"),
        )?;
    }
    scenario.fact("vhost with zero-copy", said);
    Ok(())
}

/// Devices that pin guest memory and could not be had keep no memory away that comes later.
fn who_failed_pins_nothing(scenario: &mut Scenario) -> Outcome {
    let mut guest = Confidential::with_one_block(
        &scenario.directory().join("failed"),
        RAM_BYTES,
        "",
        &["-device", "pcie-root-port,id=port0,chassis=1"],
    )?;
    vhost_devices_fail(scenario, &mut guest)?;
    let qmp = &mut guest.machine.qmp;
    let late = json!({
        "qom-type": "memory-backend-gmem", "id": "late0", "size": MIB, "direct-map": false,
    });
    qmp.execute("object-add", late)?;
    qmp.execute("object-del", json!({"id": "late0"}))?;
    guest.finish(scenario)
}

/// An io_uring buffer gets an error of the kernel's; a disk whose transfers would get one is refused before.
fn others_who_pin(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let pages = SharedPages::of(guest.machine.pid(), RAM_BYTES)?;
    let pinned = Ring::new()?.register(&pages, START);
    let refusal = pinned.err().map(|error| error.to_string());
    scenario.check(refusal.is_some(), "a shared page can't be pinned")?;
    scenario.fact("an io_uring buffer", refusal);

    let path = std::env::temp_dir().join("direct-map-disk");
    File::create(&path)
        .and_then(|file| file.set_len(MIB))
        .attempt(|| format!("creating {}", path.display()))?;
    let answer = guest.machine.qmp.try_execute(
        "blockdev-add",
        json!({
            "driver": "file", "node-name": "disk0", "filename": path,
            "cache": {"direct": true},
        }),
    )?;
    let _ = fs::remove_file(&path);
    let said = answer.err().map(|refusal| refusal.description);
    scenario.check(
        said.as_ref()
            .is_some_and(|said| said.contains("direct-map=off")),
        format!("a disk opened with O_DIRECT is refused: {said:?}"),
    )?;
    scenario.fact("a disk with cache.direct=on", said);
    vhost_is_refused(scenario, guest)
}
