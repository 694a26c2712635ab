// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls of QEMU's threads one by one, as the kernel's tracing saw them: what a case's counts and the replay's list
//! of calls are made from.

use crate::failure::{Attempt, Failure};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

const TRACEFS: &str = "/sys/kernel/tracing";
const EVENT: &str = "events/raw_syscalls/sys_enter";
/// For each processor. The longest pass is 1 GiB in pages: 265,000 calls of 92 bytes.
const BUFFER_KIB: u64 = 48 << 10;

pub const SYS_IOCTL: u64 = libc::SYS_ioctl as u64;
pub const SYS_FALLOCATE: u64 = libc::SYS_fallocate as u64;
pub const SYS_MADVISE: u64 = libc::SYS_madvise as u64;

pub const KVM_RUN: u64 = 0xae80;
pub const KVM_SET_MEMORY_ATTRIBUTES: u64 = 0x4020_aed2;
/// On a guest_memfd; the other is on the VM.
pub const KVM_SET_MEMORY_ATTRIBUTES2: u64 = 0xc080_aed2;
/// Asks whether what was cut is gone. Bare calls do without.
pub const IOMMU_IOAS_COPY: u64 = 0x3b83;
pub const IOMMU_IOAS_MAP: u64 = 0x3b85;
pub const IOMMU_IOAS_UNMAP: u64 = 0x3b86;
pub const IOMMU_VFIO_IOAS: u64 = 0x3b88;
pub const IOMMU_IOAS_MAP_FILE: u64 = 0x3b8f;
pub const VFIO_IOMMU_MAP_DMA: u64 = 0x3b71;
pub const VFIO_IOMMU_UNMAP_DMA: u64 = 0x3b72;

/// One system call at its beginning.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    pub thread: u32,
    /// CLOCK_MONOTONIC, whole microseconds.
    pub ns: u64,
    pub number: u64,
    pub arguments: [u64; 6],
}

impl Call {
    /// The command of an ioctl.
    pub fn ioctl(&self) -> Option<u64> {
        (self.number == SYS_IOCTL).then_some(self.arguments[1] & 0xffff_ffff)
    }

    /// Words for a fact.
    pub fn name(&self) -> String {
        let name = match self.ioctl() {
            Some(IOMMU_IOAS_COPY) => "IOMMU_IOAS_COPY",
            Some(IOMMU_IOAS_MAP) => "IOMMU_IOAS_MAP",
            Some(IOMMU_IOAS_MAP_FILE) => "IOMMU_IOAS_MAP_FILE",
            Some(IOMMU_IOAS_UNMAP) => "IOMMU_IOAS_UNMAP",
            Some(IOMMU_VFIO_IOAS) => "IOMMU_VFIO_IOAS",
            Some(VFIO_IOMMU_UNMAP_DMA) => "VFIO_IOMMU_UNMAP_DMA",
            Some(KVM_SET_MEMORY_ATTRIBUTES) => "KVM_SET_MEMORY_ATTRIBUTES",
            Some(KVM_SET_MEMORY_ATTRIBUTES2) => "KVM_SET_MEMORY_ATTRIBUTES2",
            Some(other) => return format!("ioctl {other:#x}"),
            None if self.number == SYS_FALLOCATE => "fallocate",
            None if self.number == SYS_MADVISE => "madvise",
            None if self.number == libc::SYS_futex as u64 => "futex",
            None if self.number == libc::SYS_mprotect as u64 => "mprotect",
            None => return format!("system call {}", self.number),
        };
        name.to_string()
    }

    fn is_map(&self) -> bool {
        matches!(
            self.ioctl(),
            Some(IOMMU_IOAS_MAP | IOMMU_IOAS_MAP_FILE | VFIO_IOMMU_MAP_DMA)
        )
    }

    fn is_unmap(&self) -> bool {
        matches!(self.ioctl(), Some(IOMMU_IOAS_UNMAP | VFIO_IOMMU_UNMAP_DMA))
    }

    fn is_attributes(&self) -> bool {
        matches!(
            self.ioctl(),
            Some(KVM_SET_MEMORY_ATTRIBUTES | KVM_SET_MEMORY_ATTRIBUTES2)
        )
    }

    /// What the clock around the exits and the guest's own time cost: neither is a conversion's.
    pub fn is_ours(&self) -> bool {
        self.number == libc::SYS_clock_gettime as u64 || self.ioctl() == Some(KVM_RUN)
    }
}

/// Tracing that runs until it is read or dropped.
pub struct Trace(());

impl Trace {
    /// Records the system calls of these threads from now on.
    pub fn start(threads: &[u32]) -> Result<Self, Failure> {
        stop();
        write("buffer_size_kb", &BUFFER_KIB.to_string())?;
        write("trace_clock", "mono")?;
        let list: Vec<_> = threads.iter().map(u32::to_string).collect();
        write("set_event_pid", &list.join(" "))?;
        write("trace", "")?;
        write(&format!("{EVENT}/enable"), "1")?;
        Ok(Self(()))
    }

    /// Ends it; the calls in the order of time.
    pub fn finish(self) -> Result<Vec<Call>, Failure> {
        write(&format!("{EVENT}/enable"), "0")?;
        let text = fs::read_to_string(path("trace")).attempt(|| "reading the trace".into())?;
        parse(&text)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        stop();
    }
}

fn stop() {
    // Each fails when there is nothing to stop, which is as good. A small buffer gives the memory back.
    let _ = write(&format!("{EVENT}/enable"), "0");
    let _ = write("set_event_pid", "");
    let _ = write("trace", "");
    let _ = write("buffer_size_kb", "512");
    let _ = write("trace_clock", "local");
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(TRACEFS).join(name)
}

fn write(name: &str, text: &str) -> Result<(), Failure> {
    fs::write(path(name), text).attempt(|| format!("writing {text} to {TRACEFS}/{name}"))
}

fn parse(text: &str) -> Result<Vec<Call>, Failure> {
    let header = text
        .lines()
        .find_map(|line| line.split_once("entries-in-buffer/entries-written: "))
        .map(|(_, rest)| rest.split_ascii_whitespace().next().unwrap_or_default());
    if let Some((kept, written)) = header.and_then(|word| word.split_once('/')) {
        if kept != written {
            return Err(Failure::new(format!(
                "the kernel's trace kept {kept} of {written} calls: its counts can't be trusted"
            )));
        }
    }
    text.lines()
        .filter(|line| !line.starts_with('#') && line.contains("sys_enter: NR "))
        .map(|line| parse_line(line).attempt(|| format!("cannot read this trace line: {line}")))
        .collect()
}

/// `   CPU 0/KVM-123     [001] .....    12.345678: sys_enter: NR 16 (15, 3b8f, 7ffc, 0, 0, 0)`
fn parse_line(line: &str) -> Option<Call> {
    let (front, call) = line.split_once(": sys_enter: NR ")?;
    let (task, rest) = front.rsplit_once(" [")?;
    let (seconds, micros) = rest.split_ascii_whitespace().last()?.split_once('.')?;
    let (number, arguments) = call.split_once(" (")?;
    let mut values = [0; 6];
    for (value, word) in values
        .iter_mut()
        .zip(arguments.trim_end_matches(')').split(", "))
    {
        *value = u64::from_str_radix(word, 16).ok()?;
    }
    Some(Call {
        thread: task.trim_end().rsplit_once('-')?.1.parse().ok()?,
        ns: seconds.parse::<u64>().ok()? * 1_000_000_000 + micros.parse::<u64>().ok()? * 1000,
        number: number.parse().ok()?,
        arguments: values,
    })
}

/// Calls of one run, by kind.
#[derive(Debug, Default, PartialEq)]
pub struct Counts {
    pub map: u64,
    pub unmap: u64,
    pub attributes: u64,
    pub other: u64,
    pub by_name: BTreeMap<String, u64>,
}

impl Counts {
    pub fn of<'a>(calls: impl Iterator<Item = &'a Call>) -> Self {
        let mut counts = Self::default();
        for call in calls.filter(|call| !call.is_ours()) {
            let kind = match () {
                () if call.is_map() => &mut counts.map,
                () if call.is_unmap() => &mut counts.unmap,
                () if call.is_attributes() => &mut counts.attributes,
                () => &mut counts.other,
            };
            *kind += 1;
            *counts.by_name.entry(call.name()).or_insert(0) += 1;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::{parse, Counts, IOMMU_IOAS_MAP_FILE};

    const TEXT: &str = "# tracer: nop\n#\n# entries-in-buffer/entries-written: 3/3   #P:2\n#\n\
        \x20      CPU 0/KVM-123     [001] .....    12.345678: sys_enter: NR 16 (f, 3b8f, 7ffc00, 0, 0, 0)\n\
        \x20      CPU 0/KVM-123     [001] .....    12.345679: sys_enter: NR 16 (c, ae80, 0, 0, 0, 0)\n\
        \x20 qemu-system-x86-99      [000] d..1.     0.000002: sys_enter: NR 285 (5, 3, 1000, 2000, 0, 0)\n";

    #[test]
    fn calls_are_read_with_thread_time_and_arguments() {
        let calls = parse(TEXT).unwrap();
        assert_eq!(calls.len(), 3);
        assert_eq!(calls[0].ioctl(), Some(IOMMU_IOAS_MAP_FILE));
        assert_eq!((calls[0].thread, calls[0].ns), (123, 12_345_678_000));
        assert_eq!(calls[2].name(), "fallocate");
        assert_eq!(calls[2].arguments[2], 0x1000);
        assert_eq!(calls[2].thread, 99);
    }

    #[test]
    fn the_guests_time_is_no_call_of_a_conversion() {
        let counts = Counts::of(parse(TEXT).unwrap().iter());
        assert_eq!((counts.map, counts.unmap, counts.other), (1, 0, 1));
    }

    #[test]
    fn a_trace_that_lost_calls_is_refused() {
        assert!(parse(&TEXT.replace("3/3", "3/4")).is_err());
    }
}
