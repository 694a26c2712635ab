// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a Linux guest is there for: one job, its result as a marked JSON line on the only serial port it has.
//!
//! After the result the guest waits for a line from outside, so that the host can measure while the memory is in use.

use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::monitor::protocol::pattern;
use serde_json::{json, Value};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// In front of a result, since the kernel's messages share the line.
pub const MARK: &str = "@lab ";
/// What the host says to have the job done once more.
pub const AGAIN: &str = "again";

const DISK: &str = "/dev/nvme0n1";
const DISK_PATIENCE: Duration = Duration::from_secs(120);
/// How much of the disk is read, and where the answer is written.
const DISK_BYTES: u64 = 16 << 20;
const DISK_KEY: u8 = 0xa5;

/// Runs the job that `lab.job` names.
pub fn run(command_line: &CommandLine) -> Result<(), Failure> {
    // From here on the kernel prints nothing: a message inside the result's line would spoil it.
    console_level(0);
    let job = command_line.value("lab.job").unwrap_or("idle");
    while once(job, command_line)?.trim() == AGAIN {}
    console_level(7);
    Ok(())
}

/// Runs it and waits; what the host said.
fn once(job: &str, command_line: &CommandLine) -> Result<String, Failure> {
    let result = match job {
        "idle" => Ok(sleeps()),
        "clock" => clock(),
        "pattern" => memory_pattern(command_line),
        "nvme" => disk(),
        "nvme-read" => disk_read(),
        _ => Err(Failure::new(format!("there is no job {job}"))),
    };
    let line = match result {
        Ok(facts) => json!({"job": job, "error": null, "facts": facts}),
        Err(failure) => json!({"job": job, "error": failure.to_string(), "facts": {}}),
    };
    println!("\n{MARK}{line}");
    let mut go_on = String::new();
    io::stdin()
        .lock()
        .read_line(&mut go_on)
        .attempt(|| "waiting for the host".into())?;
    Ok(go_on)
}

/// Messages below this level go to the console. Best effort: it is about readability.
fn console_level(level: u32) {
    let _ = fs::write("/proc/sys/kernel/printk", level.to_string());
}

/// How long short sleeps take: a machine whose timers come late is no ground for any measurement.
fn sleeps() -> Value {
    const SLEEPS: u32 = 50;
    let begin = Instant::now();
    for _ in 0..SLEEPS {
        thread::sleep(Duration::from_millis(10));
    }
    json!({"sleeps": SLEEPS, "milliseconds": begin.elapsed().as_millis() as u64})
}

/// Which clocks there are, and which is taken.
fn clock() -> Result<Value, Failure> {
    let read = |name: &str| {
        let path = format!("/sys/devices/system/clocksource/clocksource0/{name}_clocksource");
        fs::read_to_string(&path)
            .map(|text| text.trim().to_string())
            .attempt(|| format!("reading {path}"))
    };
    Ok(json!({"current": read("current")?, "available": read("available")?, "sleeps": sleeps()}))
}

/// Writes a pattern over `lab.bytes` bytes, then reads all of it again.
fn memory_pattern(command_line: &CommandLine) -> Result<Value, Failure> {
    let bytes: u64 = command_line
        .value("lab.bytes")
        .and_then(|text| text.parse().ok())
        .attempt(|| "the job needs lab.bytes=N".into())?;
    let mut memory = Pages::new(bytes as usize)?;
    let words = memory.words();
    const SEED: u64 = 1;
    for (index, word) in words.iter_mut().enumerate() {
        *word = pattern(SEED, index as u64 * 8);
    }
    // Nothing may be believed because it was just written: the compiler must load every word.
    let wrong = words
        .iter()
        .enumerate()
        .filter(|(index, word)| {
            // SAFETY: a reference is a valid pointer.
            let found = unsafe { std::ptr::from_ref(*word).read_volatile() };
            found != pattern(SEED, *index as u64 * 8)
        })
        .count();
    if wrong != 0 {
        return Err(Failure::new(format!(
            "{wrong} words of {bytes} bytes are not what was written"
        )));
    }
    let total = total_memory()?;
    Ok(json!({"bytes": bytes, "linux_total": total}))
}

fn total_memory() -> Result<u64, Failure> {
    let text = fs::read_to_string("/proc/meminfo").attempt(|| "reading /proc/meminfo".into())?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .attempt(|| "/proc/meminfo has no MemTotal".into())
}

/// Reads the first 16 MiB of the disk by DMA and writes nothing: the disk is somebody's.
fn disk_read() -> Result<Value, Failure> {
    wait_for(DISK)?;
    let disk = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(DISK)
        .attempt(|| format!("opening {DISK}"))?;
    let mut memory = Pages::new(DISK_BYTES as usize)?;
    transfer(memory.bytes(), 0, |chunk, at| disk.read_exact_at(chunk, at))
        .attempt(|| format!("reading {DISK}"))?;
    Ok(json!({"read_bytes": DISK_BYTES, "read_sha256": digest(memory.bytes())}))
}

/// Reads the first 16 MiB of the disk by DMA and writes them, each byte changed, right behind.
fn disk() -> Result<Value, Failure> {
    wait_for(DISK)?;
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(DISK)
        .attempt(|| format!("opening {DISK}"))?;
    let mut memory = Pages::new(DISK_BYTES as usize)?;
    transfer(memory.bytes(), 0, |chunk, at| disk.read_exact_at(chunk, at))
        .attempt(|| format!("reading {DISK}"))?;
    let read = digest(memory.bytes());
    for byte in memory.bytes().iter_mut() {
        *byte ^= DISK_KEY;
    }
    let written = digest(memory.bytes());
    transfer(memory.bytes(), DISK_BYTES, |chunk, at| {
        disk.write_all_at(chunk, at)
    })
    .attempt(|| format!("writing {DISK}"))?;
    disk.sync_all().attempt(|| format!("flushing {DISK}"))?;
    memory.bytes().fill(0);
    transfer(memory.bytes(), DISK_BYTES, |chunk, at| {
        disk.read_exact_at(chunk, at)
    })
    .attempt(|| format!("reading {DISK} again"))?;
    if digest(memory.bytes()) != written {
        return Err(Failure::new(
            "the disk gives back something else than was written",
        ));
    }
    Ok(
        json!({"read_bytes": DISK_BYTES, "read_sha256": read, "write_bytes": DISK_BYTES, "write_sha256": written}),
    )
}

fn transfer(
    memory: &mut [u8],
    start: u64,
    mut one: impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    const CHUNK: usize = 1 << 20;
    for (index, chunk) in memory.chunks_mut(CHUNK).enumerate() {
        one(chunk, start + (index * CHUNK) as u64)?;
    }
    Ok(())
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The NVMe driver probes asynchronously, and this kernel has no inotify to wait for the node with.
fn wait_for(path: &str) -> Result<(), Failure> {
    let deadline = Instant::now() + DISK_PATIENCE;
    while File::open(Path::new(path)).is_err() {
        if Instant::now() > deadline {
            return Err(Failure::new(format!("{path} did not appear")));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Page-aligned memory of its own mapping: O_DIRECT needs the alignment.
struct Pages {
    address: *mut libc::c_void,
    bytes: usize,
}

impl Pages {
    fn new(bytes: usize) -> Result<Self, Failure> {
        // SAFETY: a new private mapping touches nothing that exists.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        match address {
            libc::MAP_FAILED => {
                Err(io::Error::last_os_error()).attempt(|| format!("mapping {bytes} bytes"))
            }
            _ => Ok(Self { address, bytes }),
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping has that many readable and writable bytes and lives as long as self.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.bytes) }
    }

    fn words(&mut self) -> &mut [u64] {
        // SAFETY: as above; pages are aligned for words.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.bytes / 8) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference outlives self.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}
