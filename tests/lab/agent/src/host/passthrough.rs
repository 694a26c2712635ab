// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hands a PCI device to vfio-pci.

use crate::failure::{Attempt, Failure};
use std::fs;
use std::path::{Path, PathBuf};

const DEVICES: &str = "/sys/bus/pci/devices";

/// What to look for.
pub struct Wanted {
    pub name: &'static str,
    /// File in the device's directory, and what it says.
    file: &'static str,
    content: &'static str,
}

pub const NVME: Wanted = Wanted {
    name: "NVMe controller",
    file: "class",
    content: "0x010802",
};

pub const EDU: Wanted = Wanted {
    name: "edu device",
    file: "device",
    content: "0x11e8",
};

/// Gives the device to vfio-pci, whatever had it before; its PCI address.
pub fn to_vfio(wanted: &Wanted) -> Result<String, Failure> {
    let device = find(wanted)?;
    let address = device
        .file_name()
        .and_then(|name| name.to_str())
        .map(String::from)
        .attempt(|| format!("{} has no address", device.display()))?;
    let driver = device.join("driver");
    if !is_vfio(&driver) {
        write(&device.join("driver_override"), "vfio-pci")?;
        if driver.exists() {
            write(&driver.join("unbind"), &address)?;
        }
        write(Path::new("/sys/bus/pci/drivers/vfio-pci/bind"), &address)?;
    }
    if !is_vfio(&driver) {
        return Err(Failure::new(format!(
            "{address} is not with vfio-pci after the bind"
        )));
    }
    if fs::read_dir("/dev/vfio/devices").map_or(0, |entries| entries.count()) == 0 {
        return Err(Failure::new(
            "vfio-pci has a device but /dev/vfio/devices is empty",
        ));
    }
    Ok(address)
}

fn is_vfio(driver: &Path) -> bool {
    fs::read_link(driver).is_ok_and(|target| target.ends_with("vfio-pci"))
}

fn find(wanted: &Wanted) -> Result<PathBuf, Failure> {
    fs::read_dir(DEVICES)
        .attempt(|| format!("reading {DEVICES}"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|device| {
            fs::read_to_string(device.join(wanted.file))
                .is_ok_and(|content| content.trim() == wanted.content)
        })
        .attempt(|| format!("this machine has no {}", wanted.name))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text).attempt(|| format!("writing {text} to {}", path.display()))
}
