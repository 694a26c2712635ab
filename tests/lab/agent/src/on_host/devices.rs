// SPDX-License-Identifier: MIT OR Apache-2.0
//! A PCI device of the host's: looked at, taken from its driver, given back.

use serde_json::{json, Value};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const DEVICES: &str = "/sys/bus/pci/devices";
const DRIVERS: &str = "/sys/bus/pci/drivers";
const VFIO: &str = "vfio-pci";
/// For a driver to find its disks again.
const DISK_PATIENCE: Duration = Duration::from_secs(30);
const CLASS_BRIDGE: &str = "0x06";
const CLASS_NVME: &str = "0x010802";
const EDU: (&str, &str) = ("0x1234", "0x11e8");

/// One that can be taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    pub address: String,
    pub class: String,
    pub vendor: String,
    pub device: String,
    /// Who has it; nobody may.
    pub driver: Option<String>,
    /// `driver_override` as it was.
    before: String,
    /// Its block devices and network interfaces.
    pub disks: Vec<String>,
}

/// A device that vfio-pci has until this is dropped.
pub struct Taken {
    pub device: Device,
    given_back: bool,
    _lock: File,
}

impl Device {
    /// Looks at it. An error says why it can't be taken.
    pub fn find(address: &str) -> Result<Self, String> {
        let path = Path::new(DEVICES).join(address);
        if !path.exists() {
            return Err(format!(
                "there is no PCI device {address}: `lspci -D` lists what there is"
            ));
        }
        let word = |name: &str| {
            fs::read_to_string(path.join(name))
                .unwrap_or_default()
                .trim()
                .to_string()
        };
        let device = Self {
            address: address.to_string(),
            class: word("class"),
            vendor: word("vendor"),
            device: word("device"),
            driver: driver(&path),
            before: word("driver_override"),
            disks: below(&path, "block")
                .iter()
                .map(|disk| head_of(disk))
                .collect(),
        };
        device.is_free(&path)?;
        Ok(device)
    }

    fn is_free(&self, path: &Path) -> Result<(), String> {
        let address = &self.address;
        if self.class.starts_with(CLASS_BRIDGE) {
            return Err(format!(
                "{address} is a bridge: other devices are behind it"
            ));
        }
        if !Path::new(DRIVERS).join(VFIO).exists() {
            return Err(format!(
                "{address}: the driver vfio-pci is not loaded: `modprobe vfio-pci`"
            ));
        }
        if !Path::new("/dev/iommu").exists() {
            return Err(format!("{address}: there is no /dev/iommu: `modprobe iommufd`, with a kernel that has it (CONFIG_IOMMUFD, CONFIG_VFIO_DEVICE_CDEV)"));
        }
        let others = match fs::read_dir(path.join("iommu_group/devices")) {
            Ok(entries) => entries,
            Err(_) => {
                return Err(format!(
                    "{address} is in no IOMMU group: boot the kernel with an IOMMU switched on (intel_iommu=on, or AMD's in the firmware's setup)"
                ))
            }
        };
        for other in others.flatten() {
            let name = other.file_name().to_string_lossy().into_owned();
            let bridge = fs::read_to_string(other.path().join("class"))
                .is_ok_and(|class| class.starts_with(CLASS_BRIDGE));
            match driver(&other.path()) {
                Some(driver) if name != *address && driver != VFIO && !bridge => {
                    return Err(format!(
                        "{address} shares its IOMMU group with {name}, which {driver} uses: both could reach each other's memory"
                    ));
                }
                _ => {}
            }
        }
        for disk in &self.disks {
            disk_is_free(disk).map_err(|reason| format!("{address} is in use: {reason}"))?;
        }
        for interface in below(path, "net") {
            let flags =
                fs::read_to_string(format!("/sys/class/net/{interface}/flags")).unwrap_or_default();
            if is_up(&flags) {
                return Err(format!(
                    "{address} is in use: its network interface {interface} is up"
                ));
            }
        }
        if class_is_network(&self.class)
            && self.driver.is_some()
            && !path.join("vfio-dev").exists()
            && below(path, "net").is_empty()
        {
            return Err(format!(
                "{address} is a network device with a driver and without an interface that can be seen here: it may be in a \
                 container's network namespace"
            ));
        }
        let word = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        if !matches!(word("sriov_numvfs").trim(), "" | "0") {
            return Err(format!(
                "{address} is in use: it has virtual functions (sriov_numvfs)"
            ));
        }
        if word("boot_vga").trim() == "1" {
            return Err(format!("{address} is in use: it is this host's own screen"));
        }
        if let Some(process) = opener_of(path, &self.disks) {
            return Err(format!(
                "{address} is in use: process {process} has a device file of it open"
            ));
        }
        {
            if let Some(process) = user_of(path) {
                return Err(format!(
                    "{address} is in use: process {process} has it open through vfio-pci"
                ));
            }
        }
        Ok(())
    }

    pub fn is_nvme(&self) -> bool {
        self.class == CLASS_NVME
    }

    /// The lab's DMA engine.
    pub fn is_engine(&self) -> bool {
        (self.vendor.as_str(), self.device.as_str()) == EDU
    }

    /// For who is asked.
    pub fn describe(&self) -> String {
        let driver = self.driver.as_deref().unwrap_or("no driver");
        let disks = match self.disks.as_slice() {
            [] => String::new(),
            disks => format!(", disks {}", disks.join(", ")),
        };
        format!(
            "{} (class {}, {}:{}{disks}) from {driver}",
            self.address, self.class, self.vendor, self.device
        )
    }

    pub fn to_json(&self, returned: bool) -> Value {
        json!({
            "address": self.address, "class": self.class, "vendor": self.vendor, "device": self.device,
            "driver": self.driver, "given_back": returned,
        })
    }

    /// Gives it to vfio-pci. If that fails it goes back, and `left` says what could not.
    pub fn take(self) -> Result<Taken, Untaken> {
        let path = Path::new(DEVICES).join(&self.address);
        let address = self.address.clone();
        let untaken = |reason: String| Untaken {
            reason: format!("{address} can't be taken: {reason}"),
            left: None,
        };
        let lock = lock(&path).map_err(untaken)?;
        // What was asked before may have changed since.
        self.is_free(&path).map_err(untaken)?;
        let claims: Vec<File> = self
            .disks
            .iter()
            .map(|disk| claim(disk))
            .collect::<Result<_, _>>()
            .map_err(untaken)?;
        let mut taken = Taken {
            device: self,
            given_back: false,
            _lock: lock,
        };
        if taken.device.driver.as_deref() == Some(VFIO) {
            return Ok(taken);
        }
        let all = || -> Result<(), String> {
            write(&path.join("driver_override"), VFIO)?;
            if let Some(driver) = &taken.device.driver {
                write(&Path::new(DRIVERS).join(driver).join("unbind"), &address)?;
            }
            write(&Path::new(DRIVERS).join(VFIO).join("bind"), &address)
        };
        let result = all();
        drop(claims);
        if result.is_ok() && driver(&path).as_deref() == Some(VFIO) {
            return Ok(taken);
        }
        let reason = result
            .err()
            .unwrap_or_else(|| "vfio-pci does not take it".into());
        Err(Untaken {
            left: taken.give_back().err(),
            ..untaken(reason)
        })
    }
}

/// One that could not be taken.
#[derive(Debug)]
pub struct Untaken {
    pub reason: String,
    /// It could not be given back either.
    pub left: Option<String>,
}

/// Of two that want the same device one gets it.
fn lock(device: &Path) -> Result<File, String> {
    let path = device.join("config");
    let file = File::open(&path).map_err(|error| format!("opening {}: {error}", path.display()))?;
    // SAFETY: numbers only.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(file);
    }
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EWOULDBLOCK) => Err("another gmem-host has it".into()),
        // A kernel without file locks (CONFIG_FILE_LOCKING): what else is looked at has to do.
        Some(libc::ENOSYS) => Ok(file),
        _ => Err(format!("locking {}: {error}", path.display())),
    }
}

impl Taken {
    /// To whoever had it before. Says what to do by hand if that fails.
    pub fn give_back(&mut self) -> Result<(), String> {
        if std::mem::replace(&mut self.given_back, true)
            || self.device.driver.as_deref() == Some(VFIO)
        {
            return Ok(());
        }
        let Device {
            address,
            driver: before,
            before: old_override,
            disks,
            ..
        } = &self.device;
        let path = Path::new(DEVICES).join(address);
        let all = || -> Result<(), String> {
            // "(null)" is how none is shown; a newline is how it is written.
            let text = if old_override.is_empty() || old_override == "(null)" {
                "\n"
            } else {
                old_override
            };
            write(&path.join("driver_override"), text)?;
            if driver(&path).as_deref() == Some(VFIO) {
                write(&Path::new(DRIVERS).join(VFIO).join("unbind"), address)?;
            }
            if let (Some(before), None) = (before, driver(&path)) {
                write(&Path::new(DRIVERS).join(before).join("bind"), address)?;
            }
            if driver(&path) != *before {
                return Err(format!("it has {:?} now", driver(&path)));
            }
            let now = fs::read_to_string(path.join("driver_override")).unwrap_or_default();
            if now.trim() != old_override.as_str() {
                return Err(format!("its driver_override is {} now", now.trim()));
            }
            // The driver finds them in its own time.
            let deadline = Instant::now() + DISK_PATIENCE;
            while before.is_some()
                && disks
                    .iter()
                    .any(|disk| !Path::new("/sys/class/block").join(disk).exists())
            {
                if Instant::now() > deadline {
                    return Err(format!("its disks {} have not come back", disks.join(", ")));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        };
        all().map_err(|error| {
            let to = before.as_deref().unwrap_or("no driver");
            let by_hand = before.as_ref().map_or(String::new(), |before| format!(" && echo {address} > {DRIVERS}/{before}/bind"));
            format!(
                "{address} could not be given back to {to}: {error}; by hand: echo > {}/driver_override && \
                 echo {address} > {DRIVERS}/{VFIO}/unbind{by_hand}",
                path.display()
            )
        })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Err(error) = self.give_back() {
            complain!("gmem-host: {error}");
        }
    }
}

fn driver(path: &Path) -> Option<String> {
    let target = fs::read_link(path.join("driver")).ok()?;
    Some(target.file_name()?.to_str()?.to_string())
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text)
        .map_err(|error| format!("writing {} to {}: {error}", text.trim(), path.display()))
}

/// Names in folders called `kind` below a device, such as `nvme/nvme0/nvme0n1` for block devices.
fn below(device: &Path, kind: &str) -> Vec<String> {
    let class = Path::new("/sys/class").join(kind);
    let Ok(root) = fs::canonicalize(device) else {
        return Vec::new();
    };
    let entries = fs::read_dir(class).into_iter().flatten().flatten();
    let mut found: Vec<String> = entries
        .filter(|entry| fs::canonicalize(entry.path()).is_ok_and(|path| path.starts_with(&root)))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    found.sort();
    found
}

/// Nobody has it mounted, swaps to it or builds on it. Its partitions are as much in use as the whole.
fn disk_is_free(disk: &str) -> Result<(), String> {
    let node = format!("/dev/{disk}");
    for file in ["/proc/self/mounts", "/proc/swaps"] {
        let text = fs::read_to_string(file).unwrap_or_default();
        if let Some(line) = text.lines().find(|line| is_of(line, &node)) {
            return Err(format!("{file} has `{line}`"));
        }
    }
    let directory = PathBuf::from(format!("/sys/class/block/{disk}"));
    let parts = fs::read_dir(&directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    for part in parts
        .filter(|path| path.join("partition").exists())
        .chain([directory.clone()])
    {
        let holder = fs::read_dir(part.join("holders"))
            .ok()
            .and_then(|mut entries| entries.next()?.ok());
        if let Some(holder) = holder {
            return Err(format!(
                "{} is a part of {}",
                part.display(),
                holder.file_name().to_string_lossy()
            ));
        }
    }
    // What else claims it for itself says so; a disk that can't be asked is not ours to take.
    claim(disk).map(|_| ())
}

/// The disk for us alone, as long as the file is open.
fn claim(disk: &str) -> Result<File, String> {
    let node = format!("/dev/{disk}");
    File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&node)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => format!("somebody claims {node}"),
            _ => format!("whether {node} is in use can't be told: {error}"),
        })
}

/// With native multipath a controller's own disk is hidden, nvme0c1n1, and people use its head, nvme0n1.
fn head_of(disk: &str) -> String {
    let parts = disk.strip_prefix("nvme").and_then(|rest| {
        let (subsystem, rest) = rest.split_once('c')?;
        let (controller, namespace) = rest.split_once('n')?;
        let is_number =
            |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        (is_number(subsystem) && is_number(controller))
            .then(|| format!("nvme{subsystem}n{namespace}"))
    });
    parts.unwrap_or_else(|| disk.to_string())
}

/// Whether a line begins with this block device or a partition of it.
fn is_of(line: &str, node: &str) -> bool {
    let first = line.split_whitespace().next().unwrap_or_default();
    first.strip_prefix(node).is_some_and(|rest| {
        // sda1, but nvme0n1p1.
        let digits = match node.ends_with(|last: char| last.is_ascii_digit()) {
            true => rest.strip_prefix('p').unwrap_or_default(),
            false => rest,
        };
        rest.is_empty() || !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// IFF_UP in the interface's flags, in hexadecimal.
fn is_up(flags: &str) -> bool {
    let number = flags
        .trim()
        .strip_prefix("0x")
        .and_then(|text| u32::from_str_radix(text, 16).ok());
    number.is_some_and(|number| number & 1 != 0)
}

fn class_is_network(class: &str) -> bool {
    class.starts_with("0x02")
}

/// A process other than this one that has a device file open which belongs to the device, or one of these disks.
fn opener_of(device: &Path, disks: &[String]) -> Option<String> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let root = fs::canonicalize(device).ok()?;
    let numbers: Vec<String> = disks
        .iter()
        .filter_map(|disk| fs::read_to_string(format!("/sys/class/block/{disk}/dev")).ok())
        .map(|text| text.trim().to_string())
        .collect();
    let ours = std::process::id().to_string();
    let is_of_device = |path: &Path| -> bool {
        let Ok(data) = fs::metadata(path) else {
            return false;
        };
        let kind = match data.file_type() {
            kind if kind.is_block_device() => "block",
            kind if kind.is_char_device() => "char",
            _ => return false,
        };
        let number = format!("{}:{}", libc::major(data.rdev()), libc::minor(data.rdev()));
        let entry = fs::canonicalize(format!("/sys/dev/{kind}/{number}"));
        entry.is_ok_and(|entry| entry.starts_with(&root))
            || kind == "block" && numbers.contains(&number)
    };
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut others = processes.filter(|process| {
        let name = process.file_name();
        let name = name.to_string_lossy();
        name.bytes().all(|byte| byte.is_ascii_digit()) && name != ours.as_str()
    });
    let found = others.find(|process| {
        let files = fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        files
            .map(|file| file.path())
            .any(|file| is_of_device(&file))
    })?;
    found.file_name().into_string().ok()
}

/// A process that has this device's VFIO file open.
fn user_of(device: &Path) -> Option<String> {
    let mut files: Vec<String> = fs::read_dir(device.join("vfio-dev"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| format!("/dev/vfio/devices/{}", entry.file_name().to_string_lossy()))
        .collect();
    if let Ok(group) = fs::read_link(device.join("iommu_group")) {
        files.push(format!(
            "/dev/vfio/{}",
            group.file_name()?.to_string_lossy()
        ));
    }
    let processes = fs::read_dir("/proc").ok()?.flatten();
    for process in processes {
        let fds = fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let mut targets = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
        if targets.any(|target| files.iter().any(|file| target == Path::new(file))) {
            return process.file_name().into_string().ok();
        }
    }
    None
}

/// The SHA-256 of the first bytes of a disk, and that it has so many.
pub fn digest(disk: &str, bytes: usize) -> io::Result<String> {
    use sha2::{Digest, Sha256};
    use std::io::Read;
    let mut hash = Sha256::new();
    let mut file = File::open(format!("/dev/{disk}"))?;
    let mut chunk = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        file.read_exact(&mut chunk)?;
        hash.update(&chunk);
    }
    Ok(hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::{is_of, is_up, Device};

    #[test]
    fn partitions_are_of_their_disk_and_others_are_not() {
        for line in [
            "/dev/nvme0n1 / ext4",
            "/dev/nvme0n1p2 /boot",
            "/dev/nvme0n1p12",
        ] {
            assert!(is_of(line, "/dev/nvme0n1"), "{line}");
        }
        assert!(is_of("/dev/sda1 / ext4", "/dev/sda"));
        for line in [
            "/dev/nvme0n12 /",
            "/dev/nvme0n1x",
            "/dev/nvme0n1p",
            "tmpfs /dev",
            "",
        ] {
            assert!(!is_of(line, "/dev/nvme0n1"), "{line}");
        }
    }

    #[test]
    fn a_hidden_disk_is_asked_for_by_its_head() {
        assert_eq!(super::head_of("nvme0c12n1"), "nvme0n1");
        assert_eq!(super::head_of("nvme1c0n2p3"), "nvme1n2p3");
        for plain in ["nvme0n1", "nvme0n1p1", "sdc", "nvmecn1", "vdc1"] {
            assert_eq!(super::head_of(plain), plain);
        }
    }

    #[test]
    fn a_disk_that_cannot_be_asked_is_in_use() {
        assert!(super::disk_is_free("no-such-disk")
            .unwrap_err()
            .contains("can't be told"));
    }

    #[test]
    fn an_interface_is_up_by_its_lowest_bit() {
        assert!(is_up("0x1003\n"));
        assert!(!is_up("0x1002\n") && !is_up("") && !is_up("zzz"));
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let refusal = Device::find("ffff:ff:1f.7").unwrap_err();
        assert!(refusal.contains("ffff:ff:1f.7") && refusal.contains("lspci"));
    }
}
