// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process's memory as the kernel shows it: the mappings behind guest RAM, the files behind those, resident bytes.

use super::kernel;
use crate::failure::{Attempt, Failure};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

const PAGE_BYTES: u64 = 4096;

/// One line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq)]
pub struct Mapping {
    pub addresses: Range<u64>,
    pub shared: bool,
    pub offset: u64,
    pub inode: u64,
    pub path: String,
}

impl Mapping {
    pub fn bytes(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }

    pub fn is_guest_memfd(&self) -> bool {
        self.path.contains("[kvm-gmem]")
    }

    pub fn is_memfd(&self) -> bool {
        self.path.starts_with("/memfd:")
    }
}

/// All mappings of a process.
pub fn mappings(pid: u32) -> Result<Vec<Mapping>, Failure> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read_to_string(&path).attempt(|| format!("reading {path}"))?;
    text.lines()
        .map(|line| parse(line).attempt(|| format!("cannot read this line of {path}: {line}")))
        .collect()
}

/// The one shared mapping of a memfd or guest_memfd with that many bytes; neighbouring pieces of one file count as one,
/// since the kernel splits a mapping whose parts were advised differently.
pub fn backing(pid: u32, bytes: u64) -> Result<Mapping, Failure> {
    let candidates: Vec<_> = joined(mappings(pid)?)
        .into_iter()
        .filter(|mapping| mapping.shared && mapping.bytes() == bytes)
        .filter(|mapping| mapping.is_memfd() || mapping.is_guest_memfd())
        .collect();
    match candidates.as_slice() {
        [mapping] => Ok(mapping.clone()),
        _ => Err(Failure::new(format!(
            "expected one shared mapping of a memfd or guest_memfd with {bytes} bytes in QEMU, found {candidates:?}"
        ))),
    }
}

fn joined(mappings: Vec<Mapping>) -> Vec<Mapping> {
    let mut result: Vec<Mapping> = Vec::new();
    for next in mappings {
        match result.last_mut() {
            Some(last)
                if last.inode != 0
                    && last.inode == next.inode
                    && last.shared == next.shared
                    && last.path == next.path
                    && last.addresses.end == next.addresses.start
                    && last.offset + last.bytes() == next.offset =>
            {
                last.addresses.end = next.addresses.end;
            }
            _ => result.push(next),
        }
    }
    result
}

fn parse(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let permissions = words.next()?;
    let offset = words.next()?;
    let _device = words.next()?;
    let inode = words.next()?;
    let path: Vec<_> = words.collect();
    Some(Mapping {
        addresses: u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?,
        shared: permissions.ends_with('s'),
        offset: u64::from_str_radix(offset, 16).ok()?,
        inode: inode.parse().ok()?,
        path: path.join(" "),
    })
}

/// Resident bytes of a process that are its own (anonymous): what grows when QEMU leaks. Guest memory is not in it.
pub fn anonymous_resident(pid: u32) -> Result<u64, Failure> {
    status(pid, "RssAnon:")
}

/// Bytes that the kernel has pinned for a process's devices.
pub fn pinned(pid: u32) -> Result<u64, Failure> {
    status(pid, "VmPin:")
}

fn status(pid: u32, name: &str) -> Result<u64, Failure> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).attempt(|| format!("reading {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .attempt(|| format!("{path} has no {name}"))
}

/// The process's threads.
pub fn threads(pid: u32) -> Result<Vec<u32>, Failure> {
    let path = format!("/proc/{pid}/task");
    let entries = fs::read_dir(&path).attempt(|| format!("reading {path}"))?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect())
}

/// The path of a process's descriptor for the file behind a mapping.
pub fn descriptor(pid: u32, mapping: &Mapping) -> Result<PathBuf, Failure> {
    let directory = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&directory).attempt(|| format!("reading {directory}"))?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            let same_name = fs::read_link(path).is_ok_and(|target| {
                target.as_os_str().as_encoded_bytes() == mapping.path.as_bytes()
            });
            same_name && fs::metadata(path).is_ok_and(|data| data.ino() == mapping.inode)
        })
        .attempt(|| format!("QEMU has no descriptor for {mapping:?}"))
}

/// Every guest_memfd that a process holds, by descriptor path.
pub fn guest_memfds(pid: u32) -> Result<Vec<PathBuf>, Failure> {
    let directory = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&directory).attempt(|| format!("reading {directory}"))?;
    Ok(entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("[kvm-gmem]"))
        })
        .collect())
}

/// The memfds of RAM that a process holds, by name: there are none where all bytes are in guest_memfds.
pub fn memfds_of_ram(pid: u32) -> Result<Vec<String>, Failure> {
    let directory = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&directory).attempt(|| format!("reading {directory}"))?;
    Ok(entries
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .filter(|target| target.starts_with("/memfd:gmem"))
        .collect())
}

/// Whether the host can read a file through its descriptor path: the bytes' owner never gives it away for a guest_memfd.
pub fn readable(path: &PathBuf) -> Result<(), io::Error> {
    let mut byte = [0];
    File::open(path)?.read_at(&mut byte, 0).map(|_| ())
}

/// The file with the shared bytes of a block, as this process sees it: the memfd that QEMU maps; or, where private and shared
/// bytes are in one file, that guest_memfd.
pub struct SharedFile {
    bytes: u64,
    kind: Kind,
}

enum Kind {
    /// Opened a second time.
    Memfd(File),
    /// Looked at through QEMU's memory. The file itself is held for moments only: whoever holds it holds the VM and its memory.
    InPlace {
        pid: u32,
        inode: u64,
        memory: File,
        address: u64,
    },
}

impl SharedFile {
    /// The memfd or guest_memfd that QEMU maps with that many bytes; which of both depends on the kernel alone.
    pub fn open(pid: u32, bytes: u64) -> Result<Self, Failure> {
        let mapping = backing(pid, bytes)?;
        let in_place = kernel::in_place();
        if in_place != mapping.is_guest_memfd() {
            return Err(Failure::new(format!(
                "the shared bytes are expected in a {}, but RAM is mapped from {}",
                if in_place { "guest_memfd" } else { "memfd" },
                mapping.path
            )));
        }
        let kind = if in_place {
            let path = format!("/proc/{pid}/mem");
            let memory = File::open(&path).attempt(|| format!("opening {path}"))?;
            Kind::InPlace {
                pid,
                inode: mapping.inode,
                memory,
                address: mapping.addresses.start,
            }
        } else {
            let path = descriptor(pid, &mapping)?;
            let file = File::open(&path).attempt(|| format!("opening {}", path.display()))?;
            Kind::Memfd(file)
        };
        Ok(Self { bytes, kind })
    }

    /// Bytes that the file occupies.
    pub fn allocated(&self) -> Result<u64, Failure> {
        match &self.kind {
            Kind::Memfd(file) => {
                let data = file.metadata().attempt(|| "stat of the memfd".into())?;
                Ok(data.blocks() * 512)
            }
            Kind::InPlace { .. } => Ok(self.extents()?.iter().map(|run| run.end - run.start).sum()),
        }
    }

    /// Where the file has pages, in order.
    pub fn extents(&self) -> Result<Vec<Range<u64>>, Failure> {
        let file = match &self.kind {
            Kind::Memfd(file) => file,
            Kind::InPlace { .. } => return self.resident(),
        };
        let mut extents = Vec::new();
        let mut at = 0;
        while at < self.bytes {
            let Some(start) = seek(file, at, libc::SEEK_DATA)? else {
                break;
            };
            let end = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(self.bytes);
            extents.push(start..end);
            at = end;
        }
        Ok(extents)
    }

    /// As `extents`, of a guest_memfd, which can't say: what of it is in the page cache, which is all that it has.
    fn resident(&self) -> Result<Vec<Range<u64>>, Failure> {
        let view = self.map(0..self.bytes)?;
        let mut pages = vec![0u8; (self.bytes / PAGE_BYTES) as usize];
        // SAFETY: a mapping of that many bytes and a byte for each of its pages.
        let result = unsafe { libc::mincore(view.address, view.bytes, pages.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error()).attempt(|| "mincore of a guest_memfd".into());
        }
        let mut extents: Vec<Range<u64>> = Vec::new();
        for (offset, page) in (0..).step_by(PAGE_BYTES as usize).zip(pages) {
            match extents.last_mut() {
                _ if page & 1 == 0 => {}
                Some(run) if run.end == offset => run.end += PAGE_BYTES,
                _ => extents.push(offset..offset + PAGE_BYTES),
            }
        }
        Ok(extents)
    }

    pub fn read_into(&self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        self.try_read(buffer, offset)
            .attempt(|| format!("reading shared bytes at {offset:#x}"))
    }

    /// As `read_into`, for bytes that may be private.
    pub fn try_read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.kind {
            Kind::Memfd(file) => file.read_exact_at(buffer, offset),
            Kind::InPlace {
                memory, address, ..
            } => memory.read_exact_at(buffer, address + offset),
        }
    }

    /// A part of the file as memory, to look at.
    pub fn map(&self, range: Range<u64>) -> Result<View, Failure> {
        let bytes = (range.end - range.start) as usize;
        let duplicate;
        let file = match &self.kind {
            Kind::Memfd(file) => file,
            Kind::InPlace { pid, inode, .. } => {
                duplicate = duplicate_of(*pid, *inode)?;
                &duplicate
            }
        };
        // SAFETY: a new mapping, wherever the kernel likes; nobody else knows it.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                range.start as i64,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).attempt(|| "mapping shared bytes".into());
        }
        Ok(View { address, bytes })
    }
}

fn seek(file: &File, from: u64, whence: i32) -> Result<Option<u64>, Failure> {
    // SAFETY: lseek on an open descriptor touches no memory.
    let at = unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) };
    if at >= 0 {
        return Ok(Some(at as u64));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        error => Err(Failure::new(format!("seeking in the memfd: {error}"))),
    }
}

/// A descriptor of ours for a guest_memfd of another process: opening the other's by path is refused for these files.
pub fn duplicate_of(pid: u32, inode: u64) -> Result<File, Failure> {
    let is_it = |path: &PathBuf| fs::metadata(path).is_ok_and(|data| data.ino() == inode);
    let number = guest_memfds(pid)?
        .into_iter()
        .find(is_it)
        .and_then(|path| path.file_name()?.to_str()?.parse::<i32>().ok())
        .attempt(|| format!("QEMU has no guest_memfd with inode {inode}"))?;
    let what = || format!("duplicating descriptor {number} of process {pid}");
    // SAFETY: numbers only.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if process < 0 {
        return Err(io::Error::last_os_error()).attempt(what);
    }
    // SAFETY: a descriptor that was just opened and that nobody else has.
    let process = unsafe { File::from_raw_fd(process as i32) };
    // SAFETY: numbers only, of a descriptor that is open.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    if copy < 0 {
        return Err(io::Error::last_os_error()).attempt(what);
    }
    // SAFETY: as above.
    Ok(unsafe { File::from_raw_fd(copy as i32) })
}

/// A part of a file, mapped until it is dropped.
pub struct View {
    address: *mut libc::c_void,
    bytes: usize,
}

impl View {
    pub fn address(&self) -> *const u8 {
        self.address.cast()
    }

    /// Copies bytes by way of the kernel: those that can't be touched are an error and no signal.
    pub fn read_into(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        if end > self.bytes as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        File::open("/proc/self/mem")?.read_exact_at(buffer, self.address as u64 + offset)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: this very mapping, of which no reference is given out.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}

/// How many bytes of `range` the extents cover.
pub fn overlap(extents: &[Range<u64>], range: &Range<u64>) -> u64 {
    extents
        .iter()
        .map(|extent| {
            extent
                .end
                .min(range.end)
                .saturating_sub(extent.start.max(range.start))
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::{joined, overlap, parse};

    #[test]
    fn a_mapping_in_pieces_is_one_again() {
        let lines = [
            "7f0000000000-7f0000200000 rw-s 00000000 00:01 77 /memfd:gmem-ram0 (deleted)",
            "7f0000200000-7f0000400000 rw-s 00200000 00:01 77 /memfd:gmem-ram0 (deleted)",
            "7f0000400000-7f0000600000 rw-s 00000000 00:01 78 /memfd:gmem-ram0 (deleted)",
            "7f0000600000-7f0000601000 rw-p 00000000 00:00 0 ",
        ];
        let mappings = joined(lines.iter().map(|line| parse(line).unwrap()).collect());
        assert_eq!(mappings.len(), 3);
        assert_eq!(mappings[0].bytes(), 4 << 20);
        assert!(mappings[0].is_memfd() && mappings[0].shared);
        assert!(!mappings[2].shared);
        assert_eq!(mappings[2].path, "");
    }

    #[test]
    fn guest_memfds_are_known_by_name() {
        let line = "7f0000000000-7f0020000000 rw-s 00000000 00:0f 1042 /[kvm-gmem] (deleted)";
        assert!(parse(line).unwrap().is_guest_memfd());
    }

    #[test]
    fn overlaps_are_counted_in_bytes() {
        let extents = [0..0x2000, 0x4000..0x8000];
        assert_eq!(overlap(&extents, &(0x1000..0x5000)), 0x2000);
        assert_eq!(overlap(&extents, &(0x2000..0x4000)), 0);
    }
}
