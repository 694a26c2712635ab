// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is looked at before anything is done: a sentence that says what is wrong and what helps.

use super::facts::memory;
use super::options::Options;
use crate::place::Image;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Made with the folder: for each file its SHA-256 and name, as `sha256sum` writes them.
const LIST: &str = "SHA256SUMS";
/// Logs, and what a guest that is dumped or boots from a disk writes.
const WORK_BYTES: u64 = 512 << 20;
const FIRMWARE_LIMIT: u64 = 16 << 20;

/// The folder that this program lies in, complete.
pub fn folder(program: &Path) -> Result<PathBuf, String> {
    let folder = program.parent().unwrap_or(Path::new("/")).to_path_buf();
    let text = folder.display();
    if folder.as_os_str().as_bytes().contains(&b',') {
        return Err(format!(
            "{text} has a comma in its name, which ends an option of QEMU's: rename the folder"
        ));
    }
    if folder.to_str().is_none() {
        return Err(format!("{text} is no text in UTF-8: rename the folder"));
    }
    let list = folder.join(LIST);
    let list = fs::read_to_string(&list).map_err(|error| {
        format!(
            "{}: {error}; copy the whole folder that `cargo lab host` made",
            list.display()
        )
    })?;
    complete(&folder, &list)?;
    Ok(folder)
}

fn complete(folder: &Path, list: &str) -> Result<(), String> {
    for line in list.lines() {
        let (expected, name) = line
            .split_once("  ")
            .ok_or_else(|| format!("{LIST} has a line that is none: {line}"))?;
        let path = folder.join(name);
        let found = sha256(&path)
            .map_err(|error| format!("{}: {error}; copy the whole folder again", path.display()))?;
        if found != expected {
            return Err(format!(
                "{} is not what it was when the folder was made; copy it again",
                path.display()
            ));
        }
        let is_program = !name.contains('.') || name.contains("/ld-");
        let mode = fs::metadata(&path).map_or(0, |data| data.permissions().mode());
        if is_program && !name.starts_with("l2/") && mode & 0o111 == 0 {
            return Err(format!("{} may not be executed: `chmod +x` it, or copy the folder with its permissions (tar, cp -a)", path.display()));
        }
    }
    Ok(())
}

pub fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut chunk)?;
        if count == 0 {
            return Ok(hash
                .finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect());
        }
        hash.update(&chunk[..count]);
    }
}

pub fn root() -> Result<(), String> {
    // SAFETY: touches nothing.
    match unsafe { libc::geteuid() } {
        0 => Ok(()),
        user => Err(format!("this has to run as root (KVM's files, devices, locked memory); this is user {user}: sudo")),
    }
}

/// There is as much memory as the largest guest needs.
pub fn has_memory(bytes: u64) -> Result<(), String> {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match memory(&text, "MemAvailable:") {
        0 => Ok(()),
        free if free >= bytes => Ok(()),
        free => Err(format!(
            "{} MiB of memory are available, guests need {}: end something",
            free >> 20,
            bytes >> 20
        )),
    }
}

/// A folder of our own, on a disk with room.
pub fn work(chosen: Option<&Path>) -> Result<PathBuf, String> {
    let parent = chosen.map_or_else(std::env::temp_dir, Path::to_path_buf);
    if parent.as_os_str().as_bytes().contains(&b',') {
        return Err(format!("{} has a comma in its name, which ends an option of QEMU's: choose another with --work", parent.display()));
    }
    let parent = parent.canonicalize().map_err(|error| {
        format!(
            "{}: {error}; choose another folder with --work",
            parent.display()
        )
    })?;
    let folder = parent.join(format!("gmem-host-{}", std::process::id()));
    let free = free_bytes(&parent).map_err(|error| format!("{}: {error}", parent.display()))?;
    if free < WORK_BYTES {
        return Err(format!(
            "{} has {} MiB left, {} are needed: choose another folder with --work",
            parent.display(),
            free >> 20,
            WORK_BYTES >> 20
        ));
    }
    // Sockets in it have names of 108 bytes at most.
    if folder.as_os_str().len() > 60 {
        return Err(format!(
            "{} is too long a name for a folder with sockets: choose a shorter one with --work",
            folder.display()
        ));
    }
    fs::create_dir(&folder).map_err(|error| {
        format!(
            "making {}: {error}; choose another folder with --work",
            folder.display()
        )
    })?;
    Ok(folder)
}

fn free_bytes(path: &Path) -> io::Result<u64> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a zeroed statvfs is a valid one, the string ends with NUL, and both outlive the call.
    let (result, data) = unsafe {
        let mut data: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &mut data), data)
    };
    match result {
        0 => Ok(data.f_bavail * data.f_frsize),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The guest that is to be booted; its files can be read and are what they are said to be.
pub fn image(
    options: &Options,
    kind: &str,
    c_bit: u64,
    reduced_bits: u64,
) -> Result<Option<Image>, String> {
    let Some(firmware) = &options.firmware else {
        return Ok(None);
    };
    let readable = |option: &str, path: &Path| -> Result<PathBuf, String> {
        let fail = |reason: String| format!("{option} {}: {reason}", path.display());
        let full = path
            .canonicalize()
            .map_err(|error| fail(error.to_string()))?;
        if !full.is_file() && option == "--firmware" || full.is_dir() {
            return Err(fail("it is no file".into()));
        }
        let mut byte = [0];
        File::open(&full)
            .and_then(|mut file| file.read_exact(&mut byte))
            .map_err(|error| fail(format!("it can't be read: {error}")))?;
        Ok(full)
    };
    let firmware = readable("--firmware", firmware)?;
    let bytes = fs::metadata(&firmware).map_or(0, |data| data.len());
    if bytes % (64 << 10) != 0 || bytes > FIRMWARE_LIMIT {
        return Err(format!(
            "--firmware {}: it has {bytes} bytes; firmware has a multiple of 64 KiB, up to 16 MiB (OVMF.fd with code and \
             variables in one, built for SNP or TDX; not OVMF_CODE.fd alone)",
            firmware.display()
        ));
    }
    Ok(Some(Image {
        kind: kind.to_string(),
        firmware,
        disk: options
            .image
            .as_deref()
            .map(|path| readable("--image", path))
            .transpose()?,
        until: options.until.clone(),
        c_bit,
        reduced_bits,
    }))
}

/// Things of the host that somebody's scenario could leave changed, to be compared.
pub fn state() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut pools = Vec::new();
    for root in [
        "/sys/kernel/mm/hugepages",
        "/sys/devices/system/node/node0/hugepages",
        "/sys/devices/system/node/node1/hugepages",
    ] {
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            let path = entry.path().join("nr_hugepages");
            pools.push((
                path.display().to_string(),
                read(&path.to_string_lossy()).trim().to_string(),
            ));
        }
    }
    pools.sort();
    let modules: Vec<String> = read("/proc/modules")
        .lines()
        .filter_map(|line| Some(line.split(' ').next()?.to_string()))
        .collect();
    let mut parameters = Vec::new();
    for module in [
        "kvm",
        "kvm_amd",
        "kvm_intel",
        "vfio_pci",
        "iommufd",
        "vhost_net",
    ] {
        let folder = format!("/sys/module/{module}/parameters");
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path().display().to_string();
            parameters.push((path.clone(), read(&path).trim().to_string()));
        }
    }
    parameters.sort();
    serde_json::json!({
        "huge-page pools": pools,
        "vm.max_map_count": read("/proc/sys/vm/max_map_count").trim(),
        "kernel.printk": read("/proc/sys/kernel/printk").trim(),
        "modules": modules,
        "module parameters": parameters,
        "mounts": read("/proc/self/mounts"),
        "tracing": read("/sys/kernel/tracing/kprobe_events"),
    })
}

/// What of it is different now, by name.
pub fn differences(before: &Value, now: &Value) -> Vec<String> {
    let Some(before) = before.as_object() else {
        return Vec::new();
    };
    before
        .iter()
        .filter(|(name, value)| now[name.as_str()] != **value)
        .map(|(name, _)| name.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn scratch(name: &str) -> PathBuf {
        let folder =
            std::env::temp_dir().join(format!("gmem-checks-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn a_folder_that_lacks_something_says_what() {
        let folder = scratch("folder");
        let program = folder.join("gmem-host");
        let refusal = super::folder(&program).unwrap_err();
        assert!(
            refusal.contains(LIST) && refusal.contains("whole folder"),
            "{refusal}"
        );

        fs::write(folder.join("a.txt"), "a").unwrap();
        fs::write(&program, "x").unwrap();
        let line = |name: &str| format!("{}  {name}\n", sha256(&folder.join(name)).unwrap());
        let list = format!("{}{}", line("a.txt"), line("gmem-host"));
        assert!(complete(&folder, &list).unwrap_err().contains("chmod +x"));
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(complete(&folder, &list), Ok(()));

        fs::write(folder.join("a.txt"), "b").unwrap();
        assert!(complete(&folder, &list)
            .unwrap_err()
            .contains("not what it was"));
        fs::remove_file(folder.join("a.txt")).unwrap();
        assert!(complete(&folder, &list).unwrap_err().contains("a.txt"));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn names_that_qemu_would_misread_are_refused() {
        assert!(super::folder(Path::new("/a,b/gmem-host"))
            .unwrap_err()
            .contains("comma"));
        assert!(work(Some(Path::new("/a,b")))
            .unwrap_err()
            .contains("--work"));
        assert!(work(Some(Path::new("/no/such/place")))
            .unwrap_err()
            .contains("--work"));
    }

    #[test]
    fn firmware_has_the_size_of_firmware() {
        let folder = scratch("firmware");
        let path = folder.join("OVMF.fd");
        let mut options = Options {
            firmware: Some(path.clone()),
            ..Options::default()
        };
        let find = |options: &Options| image(options, "snp", 51, 1);
        assert!(find(&options).unwrap_err().contains("OVMF.fd"));
        fs::write(&path, vec![0; 65536]).unwrap();
        assert_eq!(find(&options).unwrap().unwrap().kind, "snp");
        fs::write(&path, vec![0; 65535]).unwrap();
        assert!(find(&options).unwrap_err().contains("64 KiB"));
        fs::write(&path, vec![0; 65536]).unwrap();
        options.image = Some(folder.clone());
        assert!(find(&options).unwrap_err().contains("--image"));
        options.firmware = None;
        assert_eq!(find(&options), Ok(None));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn what_changed_is_named() {
        let before = json!({"a": 1, "b": [1]});
        assert!(differences(&before, &before).is_empty());
        assert_eq!(differences(&before, &json!({"a": 1, "b": [2]})), ["b"]);
    }
}
