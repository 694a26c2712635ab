// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk whose back end is another process, which maps guest memory by descriptor: QEMU's own storage daemon. It works with
//! ordinary memory and with split memory, and lives on when a guest takes pages away that it is using; it gets new memory when
//! the VM is rebuilt, may be killed and started again, and can't change the size of the files. Where such pages would vanish
//! from under it, it is refused.

use super::reset_rebuild::virtual_machines;
use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::all_done;
use crate::failure::{Attempt, Failure};
use crate::host::cgroup::Cgroup;
use crate::host::files;
use crate::host::huge_pages::Pool;
use crate::host::kernel;
use crate::host::memory::{duplicate_of, mappings, Mapping};
use crate::host::storage_daemon::{StorageDaemon, BYTES_PER_SECOND};
use crate::ledger::PAGE;
use crate::machine::Machine;
use crate::monitor::protocol::pattern;
use crate::monitor::Monitor;
use crate::place;
use crate::plugging::{Module, Port};
use crate::scenario::{Outcome, Scenario};
use crate::virtio::{Buffer, Device, Withdrawal, BLOCK, RINGS_BYTES};
use serde_json::{json, Value};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;
const RAM_BYTES: u64 = 64 * MIB;
const DIMM_BYTES: u64 = 32 * MIB;
const DISK_BYTES: u64 = 16 * MIB;
/// The rings, then a page with the request's header and its status.
const QUEUE: u64 = 16 * MIB;
const HEADER: u64 = QUEUE + RINGS_BYTES;
const HEADER_BYTES: u64 = 16;
const STATUS: u64 = HEADER + 64;
const BUFFER: u64 = 24 * MIB;
const BYTES: u64 = 64 << 10;
const SECTOR_BYTES: u64 = 512;
/// What a back end may touch of memory that nobody has touched before, and what it is told to touch.
const LIMIT: u64 = 6 * MIB;
const UNTOUCHED: u64 = 32 * MIB;
const UNTOUCHED_BYTES: u64 = 16 * MIB;
/// Requests whose memory the guest takes away.
const WITHDRAWN: u64 = 100;
const SECRET: u64 = 999;
const PATIENCE: Duration = Duration::from_secs(60);
/// A device whose queue can't be read does not answer.
const SILENCE: Duration = Duration::from_secs(1);
const DEVICE: &str = "vhost-user-blk-pci,chardev=disk0,disable-legacy=on,iommu_platform=off";
const PORT: &str = "pcie-root-port,id=port0,chassis=1";
const DISK: Device = Device {
    kind: BLOCK,
    index: 0,
    queue: 0,
    rings: QUEUE,
};

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    scenario.prefix("ordinary: ");
    ordinary(scenario)?;
    scenario.prefix("refused: ");
    refused_at_start(scenario)?;
    refused_later(scenario)?;
    if !kernel::in_place() {
        scenario.prefix("split: ");
        split(scenario)?;
    }
    scenario.prefix("");
    Ok(())
}

/// Data of a request, and where on the disk.
#[derive(Clone, Copy)]
struct Request {
    buffer: u64,
    bytes: u64,
    sector: u64,
    write: bool,
}

impl Request {
    /// The header is in memory then.
    fn buffers(&self, monitor: &mut Monitor) -> Result<[Buffer; 3], Failure> {
        monitor.write(HEADER, u64::from(self.write))?;
        monitor.write(HEADER + 8, self.sector)?;
        monitor.write(STATUS, u64::MAX)?;
        let data = Buffer {
            address: self.buffer,
            bytes: self.bytes,
            device_writes: !self.write,
        };
        Ok([
            Buffer::read(HEADER, HEADER_BYTES),
            data,
            Buffer::written(STATUS, 1),
        ])
    }

    fn offer(&self, monitor: &mut Monitor) -> Result<u64, Failure> {
        let buffers = self.buffers(monitor)?;
        DISK.offer(monitor, &buffers)
    }

    /// The status that the device gave, 0 if all is well; None if it stayed silent.
    fn end(monitor: &mut Monitor, offered: u64, wait: Duration) -> Result<Option<u64>, Failure> {
        match DISK.wait(monitor, offered, wait)? {
            true => Ok(Some(monitor.read(STATUS)? & 0xff)),
            false => Ok(None),
        }
    }

    fn run(&self, monitor: &mut Monitor, wait: Duration) -> Result<Option<u64>, Failure> {
        let offered = self.offer(monitor)?;
        Self::end(monitor, offered, wait)
    }
}

/// A guest's disk, and who serves it.
struct Disk {
    daemon: StorageDaemon,
    seed: u64,
}

impl Disk {
    fn start(scenario: &Scenario, name: &str) -> Result<Self, Failure> {
        let directory = scenario.directory().join(name);
        fs::create_dir_all(&directory).attempt(|| format!("creating {}", directory.display()))?;
        let daemon = StorageDaemon::start(&directory, DISK_BYTES)?;
        Ok(Self { daemon, seed: 0 })
    }

    /// What the guest writes is on the disk, and comes back; returns the seed that is in the buffer then.
    fn works(
        &mut self,
        scenario: &Scenario,
        monitor: &mut Monitor,
        buffer: u64,
        when: &str,
    ) -> Result<u64, Failure> {
        self.seed += 1;
        let seed = self.seed;
        let request = Request {
            buffer,
            bytes: BYTES,
            sector: seed * (BYTES / SECTOR_BYTES),
            write: true,
        };
        monitor.fill(buffer, BYTES, seed)?;
        let status = request.run(monitor, PATIENCE)?;
        scenario.check_equal(status, Some(0), format!("{when}: the disk is written"))?;
        let same = self
            .words(request.sector)?
            .into_iter()
            .zip((buffer..).step_by(8))
            .all(|(word, at)| word == pattern(seed, at));
        scenario.check(same, format!("{when}: the image has what the guest wrote"))?;

        monitor.zero(buffer, BYTES)?;
        let request = Request {
            write: false,
            ..request
        };
        let status = request.run(monitor, PATIENCE)?;
        scenario.check_equal(status, Some(0), format!("{when}: the disk is read"))?;
        let difference = monitor.check(buffer, BYTES, seed)?;
        scenario.check_equal(
            difference,
            None,
            format!("{when}: the guest reads what it wrote"),
        )?;
        scenario.progress(format!("{when}: the disk works"));
        Ok(seed)
    }

    /// What is on the disk from a sector on.
    fn words(&self, sector: u64) -> Result<Vec<u64>, Failure> {
        let mut bytes = vec![0; BYTES as usize];
        self.daemon
            .disk()?
            .read_exact_at(&mut bytes, sector * SECTOR_BYTES)
            .attempt(|| "reading the disk's image".into())?;
        let words = bytes.chunks_exact(8);
        let words = words.filter_map(|word| word.first_chunk());
        Ok(words.map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// Guest memory that the daemon maps.
    fn maps(&self) -> Result<Vec<Mapping>, Failure> {
        let all = mappings(self.daemon.pid())?.into_iter();
        Ok(all
            .filter(|m| m.shared && (m.is_guest_memfd() || m.is_memfd()))
            // What it keeps of requests in flight is no guest memory.
            .filter(|m| !m.path.contains("inflight"))
            .collect())
    }

    /// The same by inode.
    fn files(&self) -> Result<BTreeSet<u64>, Failure> {
        Ok(self.maps()?.iter().map(|mapping| mapping.inode).collect())
    }

    fn lives(&mut self, scenario: &Scenario, when: &str) -> Outcome {
        let ended = self.daemon.ended()?;
        scenario.check(
            ended.is_none(),
            format!(
                "{when}: the back end lives: {ended:?}, {}",
                self.daemon.complaints()
            ),
        )
    }

    /// Killed while it has a request, which a new one ends.
    fn replace(&mut self, scenario: &mut Scenario, name: &str, monitor: &mut Monitor) -> Outcome {
        let request = Request {
            buffer: BUFFER,
            bytes: BYTES,
            sector: self.seed * (BYTES / SECTOR_BYTES),
            write: false,
        };
        // For a second nothing else passes after this one.
        let long = Request {
            buffer: BUFFER + BYTES,
            bytes: BYTES_PER_SECOND,
            sector: 0,
            write: false,
        };
        long.run(monitor, PATIENCE)?;
        monitor.zero(BUFFER, BYTES)?;
        let offered = request.offer(monitor)?;
        self.daemon.kill()?;
        let early = Request::end(monitor, offered, Duration::ZERO)?.is_some();
        scenario.fact("a request was over when its back end was killed", early);
        self.daemon = StorageDaemon::start(&scenario.directory().join(name), DISK_BYTES)?;
        let status = Request::end(monitor, offered, PATIENCE)?;
        scenario.check_equal(
            status,
            Some(0),
            "a request that was in flight when the back end was killed",
        )?;
        let difference = monitor.check(BUFFER, BYTES, self.seed)?;
        scenario.check_equal(
            difference,
            None,
            "a request that was in flight when the back end was killed has the right bytes",
        )
    }
}

fn reset(machine: &mut Machine, monitor: &mut Monitor) -> Outcome {
    machine.qmp.execute("system_reset", json!({}))?;
    monitor.wait_until_ready()?;
    DISK.start(monitor, 0).map(|_| ())
}

/// A guest whose memory is shared for good, in one guest_memfd, whatever the kernel.
fn ordinary(scenario: &mut Scenario) -> Outcome {
    let mut disk = Disk::start(scenario, "ordinary")?;
    let object = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}");
    let (mut machine, serial) = Machine::start(
        &scenario.directory().join("ordinary"),
        &[
            "-kernel",
            place::payload(),
            "-object",
            &object,
            "-m",
            "64M,slots=2,maxmem=1G",
            "-machine",
            "q35,accel=kvm,memory-backend=ram0,x-change-vmfd-on-reset=on",
            "-chardev",
            &disk.daemon.chardev(),
            "-device",
            DEVICE,
        ],
    )?;
    let mut monitor = Monitor::new(serial)?;
    DISK.start(&mut monitor, 0)?;
    disk.works(scenario, &mut monitor, BUFFER, "at first")?;
    let before = disk.files()?;
    scenario.check_equal(before.len(), 1, "files of guest memory in the back end")?;
    let kept = files::are_kept(scenario, machine.pid(), &[], "ordinary memory")?;
    scenario.fact("close-on-exec files of QEMU", kept);
    for mapping in disk.maps()? {
        let file = duplicate_of(machine.pid(), mapping.inode)?;
        keeps_its_size(scenario, &file, RAM_BYTES)?;
    }
    disk.works(scenario, &mut monitor, BUFFER, "after it tried to truncate")?;

    reset(&mut machine, &mut monitor)?;
    disk.works(scenario, &mut monitor, BUFFER, "the VM rebuilt")?;
    let after = disk.files()?;
    scenario.check(
        after.len() == 1 && after.is_disjoint(&before),
        format!("the back end has the new memory and no other: {before:?}, then {after:?}"),
    )?;
    let machines = virtual_machines()?;
    scenario.check_equal(machines, 1, "VMs that the kernel knows after a rebuild")?;
    files::are_kept(scenario, machine.pid(), &[], "ordinary memory, rebuilt")?;

    disk.replace(scenario, "ordinary", &mut monitor)?;
    disk.works(scenario, &mut monitor, BUFFER, "the back end killed")?;
    reset(&mut machine, &mut monitor)?;
    disk.works(scenario, &mut monitor, BUFFER, "rebuilt again")?;
    limited(scenario, "ordinary", &mut disk, &mut monitor)?;
    disk.works(scenario, &mut monitor, BUFFER, "at the end")?;
    disk.lives(scenario, "at the end")?;
    monitor.power_off()?;
    machine.wait_for_exit(PATIENCE)
}

/// What a back end has of guest memory can't be made smaller, or larger, whatever it tries.
fn keeps_its_size(scenario: &mut Scenario, file: &File, bytes: u64) -> Outcome {
    for length in [0, PAGE, bytes - PAGE, bytes + PAGE] {
        let refusal = file
            .set_len(length)
            .err()
            .and_then(|error| error.raw_os_error());
        scenario.check(
            matches!(refusal, Some(libc::EPERM | libc::EINVAL)),
            format!("a back end that truncates guest memory to {length:#x} bytes gets {refusal:?}"),
        )?;
    }
    // SAFETY: numbers only, on a descriptor that is open.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
    let refusal = io::Error::last_os_error();
    scenario.check(
        sealed != 0,
        "a back end can't seal guest memory against writing",
    )?;
    scenario.fact("a back end that seals guest memory", refusal.to_string());
    Ok(())
}

/// What a back end is the first to touch counts as its own memory. With less than that the kernel ends it for want of memory,
/// which is no SIGBUS; QEMU and the guest wait for another.
fn limited(scenario: &mut Scenario, name: &str, disk: &mut Disk, monitor: &mut Monitor) -> Outcome {
    let group = Cgroup::new("back-end", LIMIT)?;
    disk.daemon.enter(&group)?;
    let mut answered = 0;
    let mut ended = None;
    for buffer in (UNTOUCHED..UNTOUCHED + UNTOUCHED_BYTES).step_by(MIB as usize) {
        let request = Request {
            buffer,
            bytes: MIB,
            sector: 0,
            write: false,
        };
        let offered = request.offer(monitor)?;
        let deadline = Instant::now() + PATIENCE;
        while ended.is_none() && Instant::now() < deadline {
            if Request::end(monitor, offered, SILENCE)?.is_some() {
                answered += 1;
                break;
            }
            ended = disk.daemon.ended()?;
        }
        if ended.is_some() {
            break;
        }
    }
    let signal = ended.and_then(|status| status.signal());
    scenario.fact("MiB that a back end touched below its limit", answered);
    scenario.fact("bytes charged to it at its end", group.charged()?);
    scenario.fact("kills for want of memory", group.killed()?);
    scenario.check_equal(
        signal,
        Some(libc::SIGKILL),
        "the signal that ends a back end beyond its limit of memory",
    )?;
    drop(group);
    monitor.ask("ping")?;
    let directory = scenario.directory().join(name);
    disk.daemon = StorageDaemon::start(&directory, DISK_BYTES)?;
    DISK.start(monitor, 0).map(|_| ())
}

fn names(scenario: &mut Scenario, what: &str, said: &str, words: &[&str]) -> Outcome {
    scenario.fact(what, said);
    for word in words {
        scenario.check(
            said.contains(word),
            format!("the refusal of {what} says {word:?}: {said}"),
        )?;
    }
    Ok(())
}

fn device(platform: bool) -> Value {
    json!({
        "driver": "vhost-user-blk-pci", "id": "late0", "chardev": "disk0", "bus": "port0",
        "iommu_platform": platform,
    })
}

fn huge_object() -> Value {
    json!({
        "qom-type": "memory-backend-gmem", "id": "huge0", "size": HUGE, "hugetlb": true,
    })
}

/// What the refusal names, of a block called `id`.
fn words(id: &'static str) -> [&'static str; 4] {
    match kernel::in_place() {
        true => ["disk0", id, "in place", "emulates"],
        false => ["disk0", id, "huge pages", "hugetlb=off"],
    }
}

/// One more huge page for the host, where blocks in huge pages are what is refused.
fn pool() -> Result<Option<Pool>, Failure> {
    if kernel::in_place() {
        return Ok(None);
    }
    let pool = Pool::of(HUGE)?;
    pool.resize(pool.total()? + 1)?;
    Ok(Some(pool))
}

fn refused_at_start(scenario: &mut Scenario) -> Outcome {
    const MACHINE: &str =
        "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0";
    let mut disk = Disk::start(scenario, "start")?;
    let _pool = pool()?;
    let object = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}");
    let chardev = disk.daemon.chardev();
    let mut arguments = vec!["-object", "sw-protected-guest,id=cgs0", "-object", &object];
    arguments.extend(["-m", "64M", "-machine", MACHINE]);
    arguments.extend(["-chardev", &chardev, "-device", DEVICE]);
    let id = match kernel::in_place() {
        true => "ram0",
        false => {
            arguments.extend(["-object", "memory-backend-gmem,id=mem1,size=2M,hugetlb=on"]);
            "mem1"
        }
    };
    let said = Machine::refusal(&scenario.directory().join("start"), &arguments)?;
    names(scenario, "a device at start", &said, &words(id))?;
    disk.lives(scenario, "after a start that was refused")
}

/// First the memory whose pages vanish, then the device.
fn refused_later(scenario: &mut Scenario) -> Outcome {
    let mut disk = Disk::start(scenario, "refused")?;
    let mut guest = Confidential::with_one_block(
        &scenario.directory().join("refused"),
        RAM_BYTES,
        "",
        &["-chardev", &disk.daemon.chardev(), "-device", PORT],
    )?;
    let pool = pool()?;
    let machine = &mut guest.machine;
    if pool.is_some() {
        machine.qmp.execute("object-add", huge_object())?;
    }
    let id = if pool.is_some() { "huge0" } else { "ram0" };
    let said = files::refused_for_good(scenario, machine, "device_add", &device(false))?;
    names(scenario, "a device that comes later", &said, &words(id))?;
    if pool.is_some() {
        let huge = json!({"id": "huge0"});
        machine.qmp.execute("object-del", huge.clone())?;
        // One that fails for a reason of its own keeps no memory away, either.
        let said = files::refused_for_good(scenario, machine, "device_add", &device(true))?;
        scenario.fact("a device behind the platform's IOMMU", said);
        machine.qmp.execute("object-add", huge_object())?;
        machine.qmp.execute("object-del", huge.clone())?;

        machine.qmp.execute("device_add", device(false))?;
        let said = files::refused_for_good(scenario, machine, "object-add", &huge_object())?;
        names(scenario, "huge pages beside the device", &said, &words(id))?;
        guest.monitor.ask("ping")?;
        unplug(&mut guest)?;
        let qmp = &mut guest.machine.qmp;
        qmp.execute("object-add", huge_object())?;
        qmp.execute("object-del", huge)?;
    }
    guest.agree(scenario, "after refusals")?;
    disk.lives(scenario, "after refusals")?;
    guest.finish(scenario)
}

fn unplug(guest: &mut Confidential) -> Outcome {
    let port = Port {
        bus: "port0",
        device: "late0",
    };
    port.unplug(guest)
}

/// A confidential guest whose private pages are in another file.
fn split(scenario: &mut Scenario) -> Outcome {
    let mut disk = Disk::start(scenario, "split")?;
    let mut guest = Confidential::with_one_block(
        &scenario.directory().join("split"),
        RAM_BYTES,
        "",
        &[
            "-machine",
            "x-change-vmfd-on-reset=on",
            "-m",
            "slots=2,maxmem=1G",
            "-chardev",
            &disk.daemon.chardev(),
            "-device",
            DEVICE,
        ],
    )?;
    DISK.start(&mut guest.monitor, 0)?;
    works(scenario, &mut guest, &mut disk, BUFFER, "at first")?;
    seals(scenario, &disk)?;
    withdraw(scenario, &mut guest, &mut disk, BUFFER, WITHDRAWN)?;
    queue_goes(scenario, &mut guest, &mut disk)?;
    memory_comes_and_goes(scenario, &mut guest, &mut disk)?;

    let before = disk.files()?;
    reset(&mut guest.machine, &mut guest.monitor)?;
    guest.ledger.reset();
    guest.reopen()?;
    works(scenario, &mut guest, &mut disk, BUFFER, "the VM rebuilt")?;
    let after = disk.files()?;
    scenario.fact(
        "the back end's memory is new after a rebuild",
        before != after,
    );
    withdraw(scenario, &mut guest, &mut disk, BUFFER, WITHDRAWN / 10)?;

    disk.replace(scenario, "split", &mut guest.monitor)?;
    works(
        scenario,
        &mut guest,
        &mut disk,
        BUFFER,
        "the back end killed",
    )?;
    withdraw(scenario, &mut guest, &mut disk, BUFFER, WITHDRAWN / 10)?;

    guest.convert(scenario, UNTOUCHED, UNTOUCHED_BYTES, true)?;
    limited(scenario, "split", &mut disk, &mut guest.monitor)?;
    guest.convert(scenario, UNTOUCHED, UNTOUCHED_BYTES, false)?;
    let when = "a back end without a limit";
    works(scenario, &mut guest, &mut disk, BUFFER, when)?;
    scenario.fact("agreements", guest.agreements);
    guest.finish(scenario)
}

fn works(
    scenario: &Scenario,
    guest: &mut Confidential,
    disk: &mut Disk,
    buffer: u64,
    when: &str,
) -> Outcome {
    let seed = disk.works(scenario, &mut guest.monitor, buffer, when)?;
    guest.ledger.fill(buffer, BYTES, seed);
    guest.agree(scenario, when)
}

/// The back end's own mapping leads to a file whose size and seals are sealed.
fn seals(scenario: &mut Scenario, disk: &Disk) -> Outcome {
    let maps = disk.maps()?;
    scenario.check(!maps.is_empty(), "the back end maps guest memory")?;
    let path = |mapping: &Mapping| {
        let range = &mapping.addresses;
        let pid = disk.daemon.pid();
        format!("/proc/{pid}/map_files/{:x}-{:x}", range.start, range.end)
    };
    for path in maps.iter().map(path) {
        let file = File::options().read(true).write(true).open(&path);
        let file = file.attempt(|| format!("opening {path}"))?;
        keeps_its_size(scenario, &file, RAM_BYTES)?;
    }
    Ok(())
}

/// The guest takes the buffer of each request away while the back end is at it: to write there, and to read from there.
fn withdraw(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    disk: &mut Disk,
    buffer: u64,
    count: u64,
) -> Outcome {
    // Behind what `works` uses.
    let sector = (DISK_BYTES - BYTES) / SECTOR_BYTES;
    let when = format!("memory at {buffer:#x} withdrawn");
    for write in [false, true] {
        let request = Request {
            buffer,
            bytes: BYTES,
            sector,
            write,
        };
        let buffers = request.buffers(&mut guest.monitor)?;
        let withdrawal = Withdrawal {
            count: count / 2,
            address: buffer,
            bytes: BYTES,
            seed: SECRET,
        };
        let said = DISK.withdraw(&mut guest.monitor, withdrawal, &buffers, PATIENCE)?;
        disk.lives(scenario, &when)?;
        scenario.check_equal(said.answered, count / 2, format!("{when}: answers"))?;
        // The first few pass at once.
        scenario.check(
            said.early < said.answered.max(8) / 2,
            format!("{when}: requests were in flight then: {said:?}"),
        )?;
        let done = all_done(scenario, &said.results, &when)?;
        scenario.check_equal(done, count, format!("{when}: conversions"))?;
        guest.ledger.convert(buffer, BYTES, true);
        guest.ledger.convert(buffer, BYTES, false);
        // Zeros, or the bytes that it had when it was shared last.
        let mut page = vec![0; BYTES as usize];
        let (block, offset) = guest
            .ledger
            .place(buffer)
            .attempt(|| format!("{buffer:#x} is no RAM"))?;
        guest.shared[block].read_into(&mut page, offset)?;
        let secret = page
            .chunks_exact(8)
            .zip((buffer..).step_by(8))
            .any(|(word, at)| word == pattern(SECRET, at).to_le_bytes());
        scenario.check(
            !secret,
            format!("{when}: no private byte is in the memory that is shared again"),
        )?;
    }
    let secret = |(word, at)| word == pattern(SECRET, at);
    let leaked = disk
        .words(sector)?
        .into_iter()
        .zip((buffer..).step_by(8))
        .any(secret);
    scenario.check(!leaked, format!("{when}: no private byte is on the disk"))?;
    works(scenario, guest, disk, buffer, &when)
}

/// The queue itself turns private, or is so from the start: the device falls silent, or gives up. It is well again when it has
/// another.
fn queue_goes(scenario: &mut Scenario, guest: &mut Confidential, disk: &mut Disk) -> Outcome {
    let request = Request {
        buffer: BUFFER,
        bytes: BYTES,
        sector: 0,
        write: false,
    };
    for started in [true, false] {
        guest.convert(scenario, QUEUE, RINGS_BYTES + PAGE, true)?;
        if !started {
            DISK.start(&mut guest.monitor, 0)?;
        }
        let status = request.run(&mut guest.monitor, SILENCE)?;
        scenario.check_equal(status, None, "a device without a queue answers nothing")?;
        disk.lives(scenario, "without a queue")?;
        guest.convert(scenario, QUEUE, RINGS_BYTES + PAGE, false)?;
        DISK.start(&mut guest.monitor, 0)?;
        works(scenario, guest, disk, BUFFER, "with a queue again")?;
    }
    let said = guest.machine.complaints();
    scenario.fact("lines that QEMU said of the queue", said.lines().count());
    scenario.fact("the last of them", said.lines().last());
    Ok(())
}

fn memory_comes_and_goes(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    disk: &mut Disk,
) -> Outcome {
    let module = Module {
        device: "dimm0",
        backend: "mem1",
        bytes: DIMM_BYTES,
    };
    let before = disk.files()?;
    module.plug(guest)?;
    let gpa = module.is_there(guest)?;
    works(scenario, guest, disk, gpa + MIB, "in a module")?;
    scenario.check_equal(
        disk.files()?.difference(&before).count(),
        1,
        "files that the back end has more, of memory that was plugged in",
    )?;
    withdraw(scenario, guest, disk, gpa + MIB, WITHDRAWN / 10)?;

    module.unplug(guest)?;
    module.is_freed(guest)?;
    let deadline = Instant::now() + PATIENCE;
    while disk.files()? != before {
        scenario.check(
            Instant::now() < deadline,
            "the back end lets go of memory that was unplugged",
        )?;
    }
    disk.lives(scenario, "after unplugging")?;
    works(scenario, guest, disk, BUFFER, "after unplugging")
}
