// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest whose VM QEMU makes anew at each reset, and the steps that every scenario about that takes.

use crate::confidential::Confidential;
use crate::failure::{Attempt, Failure};
use crate::host::kernel;
use crate::lines::Lines;
use crate::machine::{Machine, Surroundings};
use crate::place;
use crate::scenario::Outcome;
use serde_json::json;
use std::path::Path;
use std::time::Duration;

pub const MIB: u64 = 1 << 20;
/// Where a device's engine has its own page.
pub const ORIGIN: u64 = 16 * MIB;
/// Where the guest has private pages, most of the time.
pub const PRIVATE: u64 = 32 * MIB;
pub const PATIENCE: Duration = Duration::from_secs(180);

/// The payload's own memory, where all else starts private.
const OPEN: u64 = 2 * MIB;
const OPEN_BYTES: u64 = 2 * MIB;

/// A guest with one block and this device of the host's, at an IOMMU.
pub fn with_device(
    directory: &Path,
    bytes: u64,
    device: &str,
    more: &[&str],
    surroundings: Surroundings,
) -> Result<Confidential, Failure> {
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    let mut arguments = vec!["-machine", "x-change-vmfd-on-reset=on"];
    arguments.extend(["-object", "iommufd,id=iommufd0", "-device", &passthrough]);
    arguments.extend(more);
    Confidential::with_one_block_in(directory, bytes, "", &arguments, surroundings)
}

/// A guest that QEMU itself loads, without firmware: in place its memory starts private but for the payload's own.
pub fn with_image(
    directory: &Path,
    bytes: u64,
    more: &[&str],
) -> Result<(Machine, Lines), Failure> {
    let kind = match kernel::in_place() {
        true => format!(",ram=private,shared-base={OPEN},shared-size={OPEN_BYTES}"),
        false => String::new(),
    };
    let guest = format!(
        "sw-protected-guest,id=cgs0,image={}{kind}",
        place::payload()
    );
    let object = format!("memory-backend-gmem,id=ram0,size={bytes}");
    let size = format!("{}M", bytes / MIB);
    let mut arguments = vec!["-object", &guest, "-object", &object, "-m", &size];
    arguments.extend([
        "-machine",
        "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0",
    ]);
    arguments.extend(more);
    Machine::start(directory, &arguments)
}

/// What QEMU says of the VM: running, prelaunch, internal-error…
pub fn status(machine: &mut Machine) -> Result<String, Failure> {
    let answer = machine.qmp.execute("query-status", json!({}))?;
    let status = answer["status"].as_str();
    status
        .map(String::from)
        .attempt(|| format!("query-status: {answer}"))
}

/// Asks for a reset and waits until it is done.
pub fn reset(machine: &mut Machine) -> Outcome {
    let qmp = &mut machine.qmp;
    while qmp.events_waiting("RESET") > 0 {
        qmp.event("RESET", Duration::ZERO)?;
    }
    qmp.execute("system_reset", json!({}))?;
    qmp.event("RESET", PATIENCE).map(|_| ())
}

/// Waits for the guest in its new VM, where everything is as at first.
pub fn started_anew(guest: &mut Confidential) -> Outcome {
    guest.monitor.wait_until_ready()?;
    guest.monitor.ask("ping")?;
    guest.ledger.reset();
    guest.reopen()
}
