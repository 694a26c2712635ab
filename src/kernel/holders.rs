// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who may hold a page that the kernel can't make private: for the error's sentence.
//!
//! The kernel says which page is held and not by whom. What this process has open tells some of it:
//! an io_uring ring lists its registered buffers by address; an iommufd or a VFIO container may have
//! the page mapped and doesn't say. A pipe, a socket or another process can't be found out. All of
//! this reads /proc, 4,000 files in a tenth of a second, so it is done when a sentence is really printed,
//! and by nobody who has anything locked that others wait for.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::Range;
use std::path::Path;

/// A process may have more open: what is beyond goes unseen.
const MAX_FILES: usize = 4096;
/// What is read of each ring's description.
const MAX_BYTES: u64 = 1 << 20;
/// So many are named.
const MAX_NAMED: usize = 3;

/// Files by which devices may have memory of this process mapped.
const DEVICE_FILES: [&str; 2] = ["/dev/iommu", "/dev/vfio/vfio"];

/// Who may hold the memory at `host`, addresses of this process: part of a sentence.
#[cold]
pub(crate) fn describe(host: Range<u64>) -> String {
    #[cfg(test)]
    looking::look();
    describe_from(Path::new("/proc/self"), host)
}

/// What tests do while somebody looks.
#[cfg(test)]
pub(crate) mod looking {
    use std::cell::RefCell;

    type Hook = Box<dyn Fn()>;

    thread_local!(static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) });

    /// Has this thread do something each time that it looks.
    pub(crate) fn then(hook: impl Fn() + 'static) {
        HOOK.set(Some(Box::new(hook)));
    }

    pub(super) fn look() {
        HOOK.with_borrow(|hook| hook.iter().for_each(|hook| hook()));
    }
}

fn describe_from(process: &Path, host: Range<u64>) -> String {
    let found = Found::of(process, &host);
    if !found.buffers.is_empty() {
        return format!("held by {}", list(&found.buffers));
    }
    let unregistered = match found.rings {
        0 => "no io_uring ring is open in this process",
        _ => "no io_uring ring of this process has it registered",
    };
    match found.devices.is_empty() {
        true => format!(
            "no holder found in this process: {unregistered}; a transfer under way, a pipe, a socket \
             or another process may have it"
        ),
        false => format!(
            "no certain holder found: {unregistered}; {} may have it mapped for devices, beside \
             gmem's DMA windows, or a transfer under way, a pipe, a socket or another process may \
             have it",
            list(&found.devices)
        ),
    }
}

fn list(names: &[String]) -> String {
    let named = names[..names.len().min(MAX_NAMED)].join(", ");
    match names.len().saturating_sub(MAX_NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

#[derive(Debug, Default)]
struct Found {
    /// Rings that are open, and buffers of theirs that have a part of the memory.
    rings: usize,
    buffers: Vec<String>,
    devices: Vec<String>,
}

impl Found {
    fn of(process: &Path, host: &Range<u64>) -> Self {
        let mut found = Self::default();
        let mut numbers: Vec<u32> = std::fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .take(MAX_FILES)
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        numbers.sort_unstable();
        for number in numbers {
            // It may have been closed meanwhile, as all that follows.
            let Ok(target) = std::fs::read_link(process.join(format!("fd/{number}"))) else {
                continue;
            };
            let Some(target) = target.to_str() else {
                continue;
            };
            if target == "anon_inode:[io_uring]" {
                found.rings += 1;
                let buffers = buffers_over(&process.join(format!("fdinfo/{number}")), host);
                let name =
                    |buffer| format!("io_uring ring fd {number}, registered buffer {buffer}");
                found.buffers.extend(buffers.into_iter().map(name));
            } else if DEVICE_FILES.contains(&target) {
                found.devices.push(format!("{target} (fd {number})"));
            }
        }
        found
    }
}

/// The numbers of a ring's registered buffers that overlap `host`: __io_uring_show_fdinfo. Empty
/// too while somebody submits to the ring, when the kernel shows nothing of it.
fn buffers_over(info: &Path, host: &Range<u64>) -> Vec<u32> {
    let Ok(file) = File::open(info) else {
        return Vec::new();
    };
    BufReader::new(file.take(MAX_BYTES))
        .lines()
        .map_while(Result::ok)
        .skip_while(|line| !line.starts_with("UserBufs:"))
        .skip(1)
        .take_while(|line| line.starts_with(' '))
        .filter_map(|line| {
            let (number, memory) = line.split_once(": 0x")?;
            let (address, length) = memory.split_once('/')?;
            let first = u64::from_str_radix(address, 16).ok()?;
            let end = first.checked_add(length.trim().parse().ok()?)?;
            let overlaps = first < host.end && host.start < end;
            overlaps.then(|| number.trim().parse().ok())?
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::os::unix::fs::symlink;

    const RING: &str = "pos:\t0\nSQEs:\t1\n    0: opcode:NOP, addr:0x1000\nUserFiles:\t1\n    0: \
                        /tmp/x\nUserBufs:\t3\n    0: 0x10000/8192\n    1: <none>\n    2: \
                        0x13000/4096\nPollList:\n  op=6, task_works=0\n    7: 0x14000/4096\n";

    /// A process that has these files open.
    struct Process(std::path::PathBuf);

    impl Process {
        fn new(name: &str, files: &[(u32, &str)]) -> Self {
            let name = format!("gmem-holders-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(name);
            std::fs::create_dir_all(dir.join("fd")).unwrap();
            std::fs::create_dir_all(dir.join("fdinfo")).unwrap();
            for (number, target) in files {
                symlink(target, dir.join(format!("fd/{number}"))).unwrap();
                std::fs::write(dir.join(format!("fdinfo/{number}")), RING).unwrap();
            }
            Self(dir)
        }

        fn holders(&self, first: u64, end: u64) -> String {
            describe_from(&self.0, first..end)
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_registered_buffer_is_named_by_its_ring_and_number() {
        let files = [(1, "/dev/null"), (12, "anon_inode:[io_uring]")];
        let process = Process::new("ring", &files);
        let ring = "held by io_uring ring fd 12, registered buffer";
        assert_eq!(process.holders(0x10000, 0x11000), format!("{ring} 0"));
        assert_eq!(process.holders(0x11000, 0x12000), format!("{ring} 0"));
        assert_eq!(process.holders(0x13000, 0x14000), format!("{ring} 2"));
        let both = format!("{ring} 0, io_uring ring fd 12, registered buffer 2");
        assert_eq!(process.holders(0x11000, 0x14000), both);
        let unregistered = "no io_uring ring of this process has it registered";
        for outside in [0xf000, 0x12000, 0x14000] {
            let sentence = process.holders(outside, outside + 0x1000);
            assert!(sentence.contains(unregistered), "{sentence}");
        }
    }

    #[test]
    fn no_more_than_a_few_are_named() {
        let files: Vec<_> = (3..20).map(|n| (n, "anon_inode:[io_uring]")).collect();
        let process = Process::new("many", &files);
        let sentence = process.holders(0x10000, 0x11000);
        assert!(
            sentence.ends_with("registered buffer 0 and 14 more"),
            "{sentence}"
        );
    }

    #[test]
    fn who_does_not_say_what_it_maps_may_have_it() {
        let files = [
            (7, "/dev/iommu"),
            (9, "/dev/vfio/vfio"),
            (11, "/dev/vfio/12"),
        ];
        let process = Process::new("devices", &files);
        let sentence = process.holders(0x10000, 0x11000);
        let named = "; /dev/iommu (fd 7), /dev/vfio/vfio (fd 9) may have it mapped for devices";
        assert!(sentence.contains(named), "{sentence}");
    }

    #[test]
    fn a_process_without_any_has_no_holder() {
        let process = Process::new("none", &[(0, "/dev/null")]);
        let sentence = process.holders(0x10000, 0x11000);
        assert!(
            sentence.starts_with("no holder found in this process"),
            "{sentence}"
        );
        assert!(describe_from(Path::new("/nowhere"), 0..1).starts_with("no holder"));
    }

    /// Registers two pages of this process with a ring: its file, or why there is none.
    fn register(memory: &mut [u8]) -> std::io::Result<OwnedFd> {
        const REGISTER_BUFFERS: libc::c_uint = 0;
        let mut parameters = [0u64; 15];
        let buffer = libc::iovec {
            iov_base: memory.as_mut_ptr().cast(),
            iov_len: memory.len(),
        };
        // SAFETY: io_uring_setup reads and writes 120 bytes; the one buffer is memory of ours, which
        // the kernel only refers to.
        unsafe {
            let ring = libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr());
            if ring < 0 {
                return Err(std::io::Error::last_os_error());
            }
            let ring = OwnedFd::from_raw_fd(ring as i32);
            let number = ring.as_raw_fd();
            match libc::syscall(
                libc::SYS_io_uring_register,
                number,
                REGISTER_BUFFERS,
                &buffer,
                1,
            ) {
                0 => Ok(ring),
                _ => Err(std::io::Error::last_os_error()),
            }
        }
    }

    #[test]
    fn the_running_kernel_shows_registered_buffers_so() {
        let mut memory = vec![0u8; 8192];
        let ring = match register(&mut memory) {
            Ok(ring) => ring,
            Err(error) => {
                // Past libtest, which swallows what a passing test prints.
                let test = "the_running_kernel_shows_registered_buffers_so";
                let _ = writeln!(std::io::stdout(), "\nSKIPPED {test}: io_uring: {error}");
                return;
            }
        };
        let first = memory.as_ptr() as u64;
        let expected = format!(
            "held by io_uring ring fd {}, registered buffer 0",
            ring.as_raw_fd()
        );
        assert_eq!(describe(first + 4096..first + 4097), expected);
        assert_ne!(describe(first + 8192..first + 8193), expected);
    }
}
