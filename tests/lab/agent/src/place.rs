// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where this program is and what it may touch: L1, which is its own, or somebody's host, of which it has a folder and what it
//! was given.

use crate::failure::{Attempt, Failure};
use serde_json::{json, Value};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const LAB: &str = "/lab";
const LAB_WORK: &str = "/run/lab";
/// Without the TSC-deadline timer: an emulated host's TSC has no constant rate, and a guest that takes the rate from
/// kvmclock sets deadlines that fire late or never (measured: sleeps of 10 ms that took minutes).
const LAB_CPU: &str = "host,tsc-deadline=off";
const QEMU: &str = "qemu-system-x86_64";
/// On a host QEMU is run by the loader and with the libraries that came with it: the host's may be older, or none.
const LOADER: &str = "lib/ld-linux-x86-64.so.2";

/// A confidential guest's own firmware and disk, on a host that can run it.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// `snp` or `tdx`.
    pub kind: String,
    pub firmware: PathBuf,
    pub disk: Option<PathBuf>,
    /// What the guest prints on its first serial port when it is up.
    pub until: String,
    /// For SNP: where the C-bit is, and how many address bits encryption costs.
    pub c_bit: u64,
    pub reduced_bits: u64,
}

/// What there is on somebody's host.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// What was copied there.
    pub folder: PathBuf,
    /// For sockets and logs; whoever started us removes it.
    pub work: PathBuf,
    pub cpu: String,
    /// PCI devices that vfio-pci has for us; no others may be taken.
    pub devices: Vec<String>,
    /// Of those, an NVMe controller, and what the first 16 MiB of its disk were.
    pub disk: Option<(String, String)>,
    pub image: Option<Image>,
    /// Multiplies the patience with guests.
    pub patience: f64,
}

static HOST: OnceLock<Host> = OnceLock::new();

impl Host {
    /// For the process that runs one scenario.
    pub fn to_json(&self) -> Value {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        json!({
            "folder": path(&self.folder), "work": path(&self.work), "cpu": self.cpu, "devices": self.devices,
            "patience": self.patience,
            "disk": self.disk.as_ref().map(|(address, digest)| json!([address, digest])),
            "image": self.image.as_ref().map(|image| json!({
                "kind": image.kind, "firmware": path(&image.firmware), "disk": image.disk.as_deref().map(path),
                "until": image.until, "c_bit": image.c_bit, "reduced_bits": image.reduced_bits,
            })),
        })
    }

    pub fn from_json(text: &str) -> Result<Self, Failure> {
        let value: Value = serde_json::from_str(text).attempt(|| "reading the orders".into())?;
        let read = || -> Option<Self> {
            let text = |value: &Value| value.as_str().map(String::from);
            let image = |image: &Value| {
                Some(Image {
                    kind: text(&image["kind"])?,
                    firmware: text(&image["firmware"])?.into(),
                    disk: text(&image["disk"]).map(PathBuf::from),
                    until: text(&image["until"])?,
                    c_bit: image["c_bit"].as_u64()?,
                    reduced_bits: image["reduced_bits"].as_u64()?,
                })
            };
            let devices = value["devices"].as_array()?;
            Some(Self {
                folder: text(&value["folder"])?.into(),
                work: text(&value["work"])?.into(),
                cpu: text(&value["cpu"])?,
                devices: devices.iter().map(text).collect::<Option<_>>()?,
                patience: value["patience"].as_f64()?,
                disk: match &value["disk"] {
                    Value::Null => None,
                    pair => Some((text(&pair[0])?, text(&pair[1])?)),
                },
                image: match &value["image"] {
                    Value::Null => None,
                    described => Some(image(described)?),
                },
            })
        };
        read().attempt(|| format!("these are no orders: {text}"))
    }
}

/// From now on this is a host.
pub fn is_host(host: Host) {
    HOST.set(host)
        .unwrap_or_else(|_| panic!("a process is at one place"));
}

/// The host; none in the lab.
pub fn host() -> Option<&'static Host> {
    HOST.get()
}

/// Whether this machine is the lab's: all of it may be changed, and nothing else runs on it.
pub fn is_lab() -> bool {
    host().is_none()
}

/// A file of the lab, by its name below its folder.
pub fn file(name: &str) -> PathBuf {
    host()
        .map_or(Path::new(LAB), |host| &host.folder)
        .join(name)
}

fn known(cell: &'static OnceLock<String>, name: &str) -> &'static str {
    cell.get_or_init(|| file(name).to_string_lossy().into_owned())
}

pub fn payload() -> &'static str {
    static PATH: OnceLock<String> = OnceLock::new();
    known(&PATH, "l2/payload.elf")
}

pub fn linux() -> &'static str {
    static PATH: OnceLock<String> = OnceLock::new();
    known(&PATH, "l2/bzImage")
}

pub fn initramfs() -> &'static str {
    static PATH: OnceLock<String> = OnceLock::new();
    known(&PATH, "l2/initramfs")
}

/// QEMU's firmware.
pub fn share() -> &'static str {
    static PATH: OnceLock<String> = OnceLock::new();
    known(&PATH, "share")
}

/// The program itself, to be looked at and not run.
pub fn qemu() -> PathBuf {
    file(QEMU)
}

/// One of the programs that were brought along, to be run.
pub fn program(name: &str) -> Command {
    match host() {
        None => Command::new(file(name)),
        Some(_) => by_loader(&file(""), name),
    }
}

/// A program in a folder, run by that folder's loader with its libraries and no others.
pub fn by_loader(folder: &Path, name: &str) -> Command {
    let mut command = Command::new(folder.join(LOADER));
    command
        .arg("--library-path")
        .arg(folder.join("lib"))
        .arg(folder.join(name));
    // Of whoever started us; glib reads some at start.
    let theirs = |name: &OsString| {
        let name = name.to_string_lossy();
        ["LD_", "G_", "GIO_", "QEMU_"]
            .iter()
            .any(|start| name.starts_with(start))
    };
    for (name, _) in std::env::vars_os().filter(|(name, _)| theirs(name)) {
        command.env_remove(name);
    }
    command
}

/// Sockets and logs of scenarios go below.
pub fn work() -> &'static Path {
    host().map_or(Path::new(LAB_WORK), |host| &host.work)
}

pub fn cpu() -> &'static str {
    host().map_or(LAB_CPU, |host| &host.cpu)
}

/// Whether a PCI device may be handed to a guest: in the lab all, on a host those that we were given.
pub fn may_take(address: &str) -> bool {
    host().is_none_or(|host| host.devices.iter().any(|device| device == address))
}

/// Patience with guests, longer where somebody asked for that.
pub fn patience(patience: std::time::Duration) -> std::time::Duration {
    patience.mul_f64(host().map_or(1.0, |host| host.patience))
}

#[cfg(test)]
mod tests {
    use super::{Host, Image};

    #[test]
    fn orders_arrive_as_they_were_given() {
        let plain = Host {
            folder: "/a b".into(),
            work: "/tmp/x".into(),
            cpu: "qemu64".into(),
            devices: vec!["0000:01:00.0".into()],
            disk: None,
            image: None,
            patience: 2.5,
        };
        let image = Image {
            kind: "snp".into(),
            firmware: "/f".into(),
            disk: Some("/d".into()),
            until: "login:".into(),
            c_bit: 51,
            reduced_bits: 1,
        };
        let full = Host {
            disk: Some(("0000:01:00.0".into(), "ab".into())),
            image: Some(image),
            ..plain.clone()
        };
        for host in [plain, full] {
            let text = host.to_json().to_string();
            assert_eq!(Host::from_json(&text).unwrap(), host);
        }
        assert!(Host::from_json("{}").is_err());
    }
}
