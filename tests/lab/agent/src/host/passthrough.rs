// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hands a PCI device to vfio-pci.

use crate::failure::{Attempt, Failure};
use crate::place;
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
    let devices = find(wanted)?;
    let first = devices
        .first()
        .attempt(|| format!("this machine has no {}", wanted.name))?;
    bind(first)
}

/// Gives the device to this driver, as a host has it that nobody has taken anything from; its PCI address.
pub fn to_driver(wanted: &Wanted, name: &str) -> Result<String, Failure> {
    let devices = find(wanted)?;
    let device = devices
        .first()
        .attempt(|| format!("this machine has no {}", wanted.name))?;
    let address = address(device)?;
    let driver = device.join("driver");
    let has = |name: &str| fs::read_link(&driver).is_ok_and(|target| target.ends_with(name));
    write(&device.join("driver_override"), "\n")?;
    if !has(name) {
        if driver.exists() {
            write(&driver.join("unbind"), &address)?;
        }
        let bind = format!("/sys/bus/pci/drivers/{name}/bind");
        write(Path::new(&bind), &address)?;
    }
    Ok(address)
}

/// Gives two devices of a kind to vfio-pci; their PCI addresses, in order.
pub fn two_to_vfio(wanted: &Wanted) -> Result<[String; 2], Failure> {
    match find(wanted)?.as_slice() {
        [first, second, ..] => Ok([bind(first)?, bind(second)?]),
        found => Err(Failure::new(format!(
            "this machine has {} of what two are wanted of: {}",
            found.len(),
            wanted.name
        ))),
    }
}

/// Gives all of a kind to vfio-pci; their PCI addresses, in order.
pub fn all_to_vfio(wanted: &Wanted) -> Result<Vec<String>, Failure> {
    find(wanted)?.iter().map(|device| bind(device)).collect()
}

fn address(device: &Path) -> Result<String, Failure> {
    let name = device.file_name().and_then(|name| name.to_str());
    name.map(String::from)
        .attempt(|| format!("{} has no address", device.display()))
}

fn bind(device: &Path) -> Result<String, Failure> {
    let address = address(device)?;
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

/// All of a kind, in the order of their addresses.
fn find(wanted: &Wanted) -> Result<Vec<PathBuf>, Failure> {
    let mut found: Vec<_> = fs::read_dir(DEVICES)
        .attempt(|| format!("reading {DEVICES}"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|device| {
            fs::read_to_string(device.join(wanted.file))
                .is_ok_and(|content| content.trim() == wanted.content)
        })
        .collect();
    // On somebody's host the others are not ours, of whatever kind they are.
    found.retain(|device| {
        let address = device.file_name().and_then(|name| name.to_str());
        address.is_some_and(place::may_take)
    });
    found.sort();
    Ok(found)
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text).attempt(|| format!("writing {text} to {}", path.display()))
}
