// SPDX-License-Identifier: MIT OR Apache-2.0
//! ioctls counted by the kernel's tracing, so that nobody has to believe QEMU's own counters.
//!
//! Two sources: a histogram of the ioctl system call by command and thread, and a probe on the function behind
//! IOMMU_IOAS_MAP that gives the addresses, which are in a structure that the system call's event doesn't show.

use crate::failure::{Attempt, Failure};
use crate::place;
use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::PathBuf;

const TRACEFS: &str = "/sys/kernel/tracing";
const IOCTL_EVENT: &str = "events/syscalls/sys_enter_ioctl";
const HISTOGRAM: &str = "hist:keys=common_pid,cmd:size=8192";
const PROBE_GROUP: &str = "gmem";
const PROBE: &str = "map_address";

pub const IOMMU_IOAS_MAP: u32 = 0x3b85;
pub const IOMMU_IOAS_UNMAP: u32 = 0x3b86;
pub const IOMMU_IOAS_MAP_FILE: u32 = 0x3b8f;
pub const IOMMU_VFIO_IOAS: u32 = 0x3b88;
pub const VFIO_IOMMU_UNMAP_DMA: u32 = 0x3b72;
pub const KVM_SET_MEMORY_ATTRIBUTES: u32 = 0x4020_aed2;
/// On a guest_memfd; the other is on the VM.
pub const KVM_SET_MEMORY_ATTRIBUTES2: u32 = 0xc080_aed2;
pub const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
pub const KVM_SET_USER_MEMORY_REGION2: u32 = 0x40a0_ae49;
pub const KVM_CREATE_GUEST_MEMFD: u32 = 0xc040_aed4;

/// Counting since it was made; ends when dropped. On a host that is not ours nothing is counted: its tracing is left alone.
pub struct Ioctls(());

impl Ioctls {
    pub fn start() -> Result<Self, Failure> {
        if !place::is_lab() {
            return Ok(Self(()));
        }
        // Leftovers of a scenario that failed here would count twice.
        stop();
        write(&format!("{IOCTL_EVENT}/trigger"), HISTOGRAM)?;
        let counting = Self(());
        // iopt_map_user_pages(ictx, iopt, &iova, uptr, length, …): System V argument registers.
        append(
            "kprobe_events",
            &format!("p:{PROBE_GROUP}/{PROBE} iopt_map_user_pages iova=+0(%dx):x64 address=%cx:x64 length=%r8:x64"),
        )?;
        write("trace", "")?;
        write(&format!("events/{PROBE_GROUP}/{PROBE}/enable"), "1")?;
        Ok(counting)
    }

    /// Whether anything is counted.
    pub fn count(&self) -> bool {
        place::is_lab()
    }

    /// Calls by these threads so far, by command.
    pub fn by_command(&self, threads: &[u32]) -> Result<BTreeMap<u32, u64>, Failure> {
        if !self.count() {
            return Ok(BTreeMap::new());
        }
        let mut counts = BTreeMap::new();
        for entry in parse_histogram(&read(&format!("{IOCTL_EVENT}/hist"))?)? {
            if threads.contains(&entry.thread) {
                *counts.entry(entry.command).or_insert(0) += entry.count;
            }
        }
        Ok(counts)
    }

    /// Every range that was handed to a device by address so far.
    pub fn maps_by_address(&self) -> Result<Vec<AddressMap>, Failure> {
        parse_probe(&read("trace")?)
    }
}

impl Drop for Ioctls {
    fn drop(&mut self) {
        if self.count() {
            stop();
        }
    }
}

/// One IOMMU_IOAS_MAP.
#[derive(Debug, PartialEq)]
pub struct AddressMap {
    pub iova: u64,
    pub address: u64,
    pub length: u64,
}

impl AddressMap {
    pub fn touches(&self, addresses: &Range<u64>) -> bool {
        self.address < addresses.end && self.address + self.length > addresses.start
    }
}

struct Entry {
    thread: u32,
    command: u32,
    count: u64,
}

fn parse_histogram(text: &str) -> Result<Vec<Entry>, Failure> {
    let dropped = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Dropped: "))
        .map_or("0", str::trim);
    if dropped != "0" {
        return Err(Failure::new(format!(
            "the kernel's ioctl histogram dropped {dropped} entries: its counts can't be trusted"
        )));
    }
    text.lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| {
            let value = |name: &str| {
                let rest = &line[line.find(name)? + name.len()..];
                let digits: String = rest
                    .trim_start_matches([':', ' '])
                    .chars()
                    .take_while(char::is_ascii_digit)
                    .collect();
                digits.parse::<u64>().ok()
            };
            Some(Entry {
                thread: value("common_pid")? as u32,
                command: value("cmd")? as u32,
                count: value("hitcount")?,
            })
        })
        .collect::<Option<_>>()
        .attempt(|| format!("cannot read the kernel's ioctl histogram: {text}"))
}

fn parse_probe(text: &str) -> Result<Vec<AddressMap>, Failure> {
    let marker = format!("{PROBE}:");
    text.lines()
        .filter(|line| !line.starts_with('#') && line.contains(&marker))
        .map(|line| {
            let value = |name: &str| {
                let word = line
                    .split_ascii_whitespace()
                    .find_map(|word| word.strip_prefix(name))?;
                u64::from_str_radix(word.strip_prefix("=0x")?, 16).ok()
            };
            Some(AddressMap {
                iova: value("iova")?,
                address: value("address")?,
                length: value("length")?,
            })
        })
        .collect::<Option<_>>()
        .attempt(|| format!("cannot read the probe's output: {text}"))
}

fn stop() {
    // Each fails when there is nothing to stop, which is as good.
    let _ = write(&format!("events/{PROBE_GROUP}/{PROBE}/enable"), "0");
    let _ = append("kprobe_events", &format!("-:{PROBE_GROUP}/{PROBE}"));
    let _ = write(&format!("{IOCTL_EVENT}/trigger"), &format!("!{HISTOGRAM}"));
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(TRACEFS).join(name)
}

fn read(name: &str) -> Result<String, Failure> {
    fs::read_to_string(path(name)).attempt(|| format!("reading {TRACEFS}/{name}"))
}

fn write(name: &str, text: &str) -> Result<(), Failure> {
    fs::write(path(name), text).attempt(|| format!("writing {TRACEFS}/{name}"))
}

fn append(name: &str, text: &str) -> Result<(), Failure> {
    use std::io::Write;
    fs::OpenOptions::new()
        .append(true)
        .open(path(name))
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .attempt(|| format!("writing {TRACEFS}/{name}"))
}

#[cfg(test)]
mod tests {
    use super::{parse_histogram, parse_probe, AddressMap, IOMMU_IOAS_MAP_FILE};

    #[test]
    fn counts_are_read_by_thread_and_command() {
        let text = "# event histogram\n#\n\n\
            { common_pid:        101, cmd:      15247 } hitcount:        512\n\
            { common_pid:        102, cmd: 1075883590 } hitcount:          3\n\n\
            Totals:\n    Hits: 515\n    Entries: 2\n    Dropped: 0\n";
        let entries = parse_histogram(text).unwrap();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].command, IOMMU_IOAS_MAP_FILE);
        assert_eq!((entries[0].thread, entries[0].count), (101, 512));
        assert!(parse_histogram(&text.replace("Dropped: 0", "Dropped: 4")).is_err());
    }

    #[test]
    fn an_address_map_is_read_with_its_range() {
        let text = "# tracer: nop\n#\n  qemu-system-x86-101   [000] .....    12.3: map_address: \
            (iopt_map_user_pages+0x0/0x90) iova=0xc0000 address=0x7f0000000000 length=0x20000\n";
        let maps = parse_probe(text).unwrap();
        let expected = AddressMap {
            iova: 0xc0000,
            address: 0x7f00_0000_0000,
            length: 0x20000,
        };
        assert_eq!(maps, [expected]);
        assert!(maps[0].touches(&(0x7f00_0001_f000..0x7f00_1000_0000)));
        assert!(!maps[0].touches(&(0x7f00_0002_0000..0x7f00_1000_0000)));
    }
}
