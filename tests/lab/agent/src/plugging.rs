// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices and memory that come to a running guest and go again.
//!
//! What goes has to be ejected by the guest. The monitor writes to the chipset's hot-plug ports (ACPI) instead, as the guest's
//! driver would, so that it goes while the guest is in the middle of something else.

use crate::confidential::Confidential;
use crate::failure::{Attempt, Failure};
use crate::host::memory::SharedFile;
use crate::ledger::Block;
use crate::qmp::{Gmem, Refusal};
use crate::scenario::Outcome;
use serde_json::{json, Value};
use std::time::{Duration, Instant};

/// As generous as a monitor command: what goes is unmapped from a device page by page.
const GONE_PATIENCE: Duration = Duration::from_secs(180);

/// The ports of the PCI hot-plug controller that select a bus and eject from it.
const PCI_SELECT: u64 = 0xcd0;
const PCI_EJECT: u64 = 0xcc8;

/// The ports of the memory hot-plug controller that select a slot and, by bit 3, eject from it.
const MEMORY_SELECT: u64 = 0xa00;
const MEMORY_CONTROL: u64 = 0xa14;
const MEMORY_EJECT: u64 = 1 << 3;

/// A root port, and the name of the passed-through device in it.
#[derive(Clone, Copy)]
pub struct Port {
    pub bus: &'static str,
    pub device: &'static str,
}

impl Port {
    pub fn try_plug(
        &self,
        guest: &mut Confidential,
        host: &str,
        iommufd: &str,
    ) -> Result<Result<Value, Refusal>, Failure> {
        guest.machine.qmp.try_execute(
            "device_add",
            json!({
                "driver": "vfio-pci", "id": self.device, "bus": self.bus,
                "host": host, "iommufd": iommufd,
            }),
        )
    }

    pub fn plug(&self, guest: &mut Confidential, host: &str, iommufd: &str) -> Outcome {
        self.try_plug(guest, host, iommufd)?
            .map(|_| ())
            .map_err(|refusal| {
                Failure::new(format!("plugging {}: {}", self.device, refusal.description))
            })
    }

    /// Returns when the device is gone.
    pub fn unplug(&self, guest: &mut Confidential) -> Outcome {
        let qmp = &mut guest.machine.qmp;
        qmp.execute("device_del", json!({"id": self.device}))?;
        let bus = qmp.execute(
            "qom-get",
            json!({
                "path": format!("/machine/peripheral/{0}/{0}", self.bus),
                "property": "acpi-pcihp-bsel",
            }),
        )?;
        write_port(guest, WORD, PCI_SELECT, &bus.to_string())?;
        write_port(guest, WORD, PCI_EJECT, "1")?;
        guest.machine.qmp.event("DEVICE_DELETED", GONE_PATIENCE)?;
        Ok(())
    }
}

/// A memory module, and the backend in it.
#[derive(Clone, Copy)]
pub struct Module {
    pub device: &'static str,
    pub backend: &'static str,
    pub bytes: u64,
}

impl Module {
    /// Plugs it in, without the books: see `is_there`.
    pub fn plug(&self, guest: &mut Confidential) -> Outcome {
        let qmp = &mut guest.machine.qmp;
        qmp.execute(
            "object-add",
            json!({"qom-type": "memory-backend-gmem", "id": self.backend, "size": self.bytes}),
        )?;
        qmp.execute(
            "device_add",
            json!({"driver": "pc-dimm", "id": self.device, "memdev": self.backend}),
        )?;
        Ok(())
    }

    /// Writes it into the ledger; where the guest sees it.
    pub fn is_there(&self, guest: &mut Confidential) -> Result<u64, Failure> {
        let gpa = self.property(guest, "addr")?;
        guest
            .ledger
            .plug(Block::small(self.backend, self.bytes), gpa);
        let file = SharedFile::open(guest.machine.pid(), self.bytes)?;
        guest.shared.push(file);
        Ok(gpa)
    }

    /// Returns when it is gone from the address map.
    pub fn unplug(&self, guest: &mut Confidential) -> Outcome {
        let slot = self.property(guest, "slot")?;
        let qmp = &mut guest.machine.qmp;
        qmp.execute("device_del", json!({"id": self.device}))?;
        write_port(guest, WORD, MEMORY_SELECT, &slot.to_string())?;
        write_port(guest, BYTE, MEMORY_CONTROL, &MEMORY_EJECT.to_string())?;
        let qmp = &mut guest.machine.qmp;
        qmp.event("DEVICE_DELETED", GONE_PATIENCE)?;
        qmp.execute("object-del", json!({"id": self.backend}))?;
        guest.ledger.unplug();
        guest.shared.pop();
        Ok(())
    }

    /// QEMU frees it when nobody can still be looking at the old address map; returns then.
    pub fn is_freed(&self, guest: &mut Confidential) -> Outcome {
        let deadline = Instant::now() + GONE_PATIENCE;
        while Gmem::query(&mut guest.machine.qmp)?
            .block(self.backend)
            .is_ok()
            || guest.private_allocated()? != guest.guest_memfd_bytes()?
        {
            if Instant::now() > deadline {
                return Err(Failure::new(
                    "does not hold: what was unplugged is freed in the end",
                ));
            }
        }
        Ok(())
    }

    fn property(&self, guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
        let path = format!("/machine/peripheral/{}", self.device);
        let arguments = json!({"path": path, "property": name});
        let value = guest.machine.qmp.execute("qom-get", arguments)?;
        value
            .as_u64()
            .attempt(|| format!("the module's {name} is no number: {value}"))
    }
}

/// The monitor's letters for 4 bytes and for 1. A digit there is a count, and the size is then that of the command before.
const WORD: char = 'w';
const BYTE: char = 'b';

fn write_port(guest: &mut Confidential, size: char, port: u64, value: &str) -> Outcome {
    guest.machine.qmp.execute(
        "human-monitor-command",
        json!({"command-line": format!("o /{size} {port} {value}")}),
    )?;
    Ok(())
}
