// SPDX-License-Identifier: MIT OR Apache-2.0
//! A request of a virtio disk is in flight while the guest turns its status byte, its data or the rings private: whichever
//! thread of QEMU finishes it lives on, the guest gets an error or nothing, and the page works again once it is shared.
//! One disk has two iothreads, each with a queue of its own.
//! The same on the main loop while two processors convert elsewhere, and, in a VM that was rebuilt, for more pages than a
//! process may have mappings.

use crate::boot::CommandLine;
use crate::confidential::{many_runs, Confidential};
use crate::failure::{Attempt, Failure};
use crate::host::huge_pages::{Pool, Taken};
use crate::host::{kernel, memory};
use crate::ledger::{Block, Ledger, PAGE};
use crate::qmp::Gmem;
use crate::release::Release;
use crate::scenario::{Outcome, Scenario};
use crate::virtio::{Buffer, Device, BLOCK, SCSI};
use serde_json::json;
use std::fs;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;
const RAM_BYTES: u64 = 128 * MIB;
/// Each in a huge page of its own.
const RINGS: u64 = 32 * MIB;
const HEADER: u64 = 36 * MIB;
const STATUS: u64 = 40 * MIB;
const DATA: u64 = 44 * MIB;
const ELSEWHERE: u64 = 96 * MIB;
const DATA_BYTES: u64 = 64 << 10;
/// So slow that after one request of `DATA_BYTES` the next one waits until it is let go.
const HELD_BYTES_PER_SECOND: u64 = 500;
const PATIENCE: Duration = Duration::from_secs(60);
const FILL: u8 = 0x5a;
/// No more stand-ins than this in a block of 4 KiB pages.
const MOST_STAND_INS: u64 = 1024;
const FEW_MAPPINGS: u64 = 5000;
const MAX_MAP_COUNT: &str = "/proc/sys/vm/max_map_count";

/// A disk, and whose thread finishes its requests.
struct Disk {
    name: &'static str,
    kind: u64,
    index: u64,
    queue: u64,
    drive: &'static str,
    /// Of each byte.
    content: u8,
    scsi: bool,
}

const DISKS: [Disk; 6] = [
    disk("an iothread", 0, "d0"),
    disk("the main loop, ioeventfd off", 1, "d1"),
    Disk {
        content: FILL,
        ..disk("an iothread, a file by a pool of threads", 2, "d2")
    },
    disk("the first of two iothreads", 3, "d4"),
    Disk {
        queue: 1,
        ..disk("the second of two iothreads", 3, "d4")
    },
    Disk {
        kind: SCSI,
        // virtio-scsi has two queues before those of requests.
        queue: 2,
        scsi: true,
        ..disk("virtio-scsi's iothread", 0, "d3")
    },
];
const MAIN_LOOP: usize = 1;
const OF_TWO: [usize; 2] = [3, 4];

const fn disk(name: &'static str, index: u64, drive: &'static str) -> Disk {
    Disk {
        name,
        kind: BLOCK,
        index,
        queue: 0,
        drive,
        content: 0,
        scsi: false,
    }
}

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let pool = match kernel::in_place() {
        true => None,
        false => {
            let pool = Pool::of(HUGE)?;
            pool.resize(RAM_BYTES / HUGE)?;
            Some(pool)
        }
    };
    let mut guest = start(scenario, pool.is_some())?;
    for index in 0..DISKS.len() {
        for (victim, address) in [("status", STATUS), ("data", DATA), ("rings", RINGS)] {
            if victim == "rings" && ![0, MAIN_LOOP, OF_TWO[1]].contains(&index) {
                continue;
            }
            one_request(scenario, &mut guest, &pool, index, (victim, address))?;
        }
    }
    busy_elsewhere(scenario, &mut guest, &pool)?;
    under_conversion(scenario, &mut guest)?;
    if pool.is_none() {
        // It has another mapping then, which must be like the first one.
        rebuild(&mut guest)?;
        scattered(scenario, &mut guest)?;
    }
    guest.fill(DATA, MIB, 9)?;
    guest.agree_but_kernel(scenario, "at the end")?;
    guest.finish(scenario)
}

fn start(scenario: &Scenario, huge: bool) -> Result<Confidential, Failure> {
    let directory = scenario.directory().join("guest");
    fs::create_dir_all(&directory).attempt(|| format!("creating {}", directory.display()))?;
    let image = directory.join("disk.img");
    fs::write(&image, vec![FILL; MIB as usize])
        .attempt(|| format!("writing {}", image.display()))?;
    let mut memory = format!(
        "memory-backend-gmem,id=ram0,size={RAM_BYTES}{}",
        many_runs()
    );
    if huge {
        memory += ",hugetlb=on,hugetlbsize=2M";
        // Somebody is to meet pages without memory, and not what is kept of them for a while.
        memory += Release::AtOnce.property();
    }
    let null = |id: &str| {
        format!("if=none,id={id},driver=null-co,size=1G,read-zeroes=on,throttling.bps-total={HELD_BYTES_PER_SECOND}")
    };
    let mut arguments: Vec<String> = ["-object", &memory, "-m", "128M", "-smp", "2", "-machine"]
        .map(String::from)
        .into();
    let mut add = |option: &str, value: String| arguments.extend([option.to_string(), value]);
    add("-object", "iothread,id=io0".into());
    add("-drive", null("d0"));
    add("-device", "virtio-blk-pci,drive=d0,iothread=io0".into());
    add("-drive", null("d1"));
    add("-device", "virtio-blk-pci,drive=d1,ioeventfd=off".into());
    add(
        "-drive",
        format!(
            "if=none,id=d2,file={},format=raw,aio=threads,throttling.bps-total={HELD_BYTES_PER_SECOND}",
            image.display()
        ),
    );
    add("-device", "virtio-blk-pci,drive=d2,iothread=io0".into());
    add("-device", "virtio-scsi-pci,iothread=io0,id=scsi0".into());
    add("-drive", null("d3"));
    add("-device", "scsi-hd,bus=scsi0.0,drive=d3".into());
    // A list can be given in JSON only. QEMU creates what is in JSON after all other devices, wherever it
    // stands, so the last place among the disks is the one that it gets.
    for id in ["io1", "io2"] {
        add("-object", format!("iothread,id={id}"));
    }
    add("-drive", null("d4"));
    let of_two = json!({"driver": "virtio-blk-pci", "drive": "d4", "num-queues": 2,
        "iothread-vq-mapping": [{"iothread": "io1"}, {"iothread": "io2"}]});
    add("-device", of_two.to_string());
    let machine = "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0,\
                   x-change-vmfd-on-reset=on";
    let at = arguments.iter().position(|word| word == "-machine");
    arguments.insert(at.map_or(0, |at| at + 1), machine.into());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let page = if huge { HUGE } else { PAGE };
    Confidential::start(
        &directory,
        &arguments,
        Ledger::new(vec![Block::huge("ram0", RAM_BYTES, page)]),
    )
}

impl Disk {
    fn device(&self) -> Device {
        Device {
            kind: self.kind,
            index: self.index,
            queue: self.queue,
            rings: RINGS,
        }
    }

    /// Starts it, and has its header ask for the first `bytes`.
    fn start(&self, guest: &mut Confidential, bytes: u64) -> Outcome {
        self.device().start(&mut guest.monitor, 0)?;
        let header = if self.scsi {
            let blocks = bytes / 512;
            // LUN 0 of target 0; a tag; READ(10), whose numbers are big-endian.
            let command = 0x28 | (blocks >> 8) << 56;
            // The command begins at byte 19.
            [
                0x0000_0000_0000_0001,
                1,
                command << 24,
                command >> 40 | (blocks & 0xff) << 24,
                0,
                0,
                0,
            ]
            .to_vec()
        } else {
            vec![0, 0]
        };
        for (address, word) in (HEADER..).step_by(8).zip(header) {
            guest.monitor.write(address, word)?;
        }
        if self.scsi {
            // The first command after a reset only hears of the reset.
            let offered = self.offer(guest, bytes)?;
            self.device().wait(&mut guest.monitor, offered, PATIENCE)?;
        }
        Ok(())
    }

    fn offer(&self, guest: &mut Confidential, bytes: u64) -> Result<u64, Failure> {
        let data = Buffer::written(DATA, bytes);
        let buffers = match self.scsi {
            true => [Buffer::read(HEADER, 51), Buffer::written(STATUS, 108), data],
            false => [Buffer::read(HEADER, 16), data, Buffer::written(STATUS, 1)],
        };
        self.device().offer(&mut guest.monitor, &buffers)
    }

    /// What says how it went: 0 is well.
    fn status(&self, guest: &mut Confidential) -> Result<u64, Failure> {
        match self.scsi {
            // Bytes 10 and 11: the SCSI status and the device's response.
            true => Ok(guest.monitor.read(STATUS + 8)? >> 16 & 0xffff),
            false => Ok(guest.monitor.read(STATUS)? & 0xff),
        }
    }

    /// A request that is to be answered, and well.
    fn works(&self, scenario: &Scenario, guest: &mut Confidential, when: &str) -> Outcome {
        let name = self.name;
        guest.monitor.write(STATUS, u64::MAX)?;
        guest.monitor.write(STATUS + 8, u64::MAX)?;
        let offered = self.offer(guest, DATA_BYTES)?;
        let answered = self.device().wait(&mut guest.monitor, offered, PATIENCE)?;
        scenario.check(answered, format!("{name}: a request is answered {when}"))?;
        scenario.check_equal(
            self.status(guest)?,
            0,
            format!("{name}: the status of a request {when}"),
        )?;
        let word = u64::from_le_bytes([self.content; 8]);
        for at in [DATA, DATA + DATA_BYTES - 8] {
            scenario.check_equal(
                guest.monitor.read(at)?,
                word,
                format!("{name}: what was read {when}"),
            )?;
        }
        Ok(())
    }

    /// From now on a second request waits; or none does.
    fn hold(&self, guest: &mut Confidential, hold: bool) -> Outcome {
        let rate = if hold { HELD_BYTES_PER_SECOND } else { 1 << 40 };
        let limits = json!({"device": self.drive, "bps": rate, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0,
            "iops_wr": 0});
        guest
            .machine
            .qmp
            .execute("block_set_io_throttle", limits)
            .map(|_| ())
    }
}

fn rebuild(guest: &mut Confidential) -> Outcome {
    guest.machine.qmp.execute("system_reset", json!({}))?;
    guest.monitor.wait_until_ready()?;
    guest.ledger.reset();
    guest.reopen()
}

fn number(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .number(name)
}

/// QEMU is there, and so is the guest.
fn alive(scenario: &Scenario, guest: &mut Confidential, when: &str) -> Outcome {
    let status = guest
        .machine
        .qmp
        .execute("query-status", json!({}))
        .map_err(|failure| Failure::new(format!("QEMU is gone, {when}: {failure}")))?;
    scenario.check_equal(
        status["status"].as_str(),
        Some("running"),
        format!("the VM's status, {when}"),
    )?;
    guest.monitor.ask("ping").map(|_| ())
}

/// The host has no huge page to spare.
fn drained(pool: &Option<Pool>) -> Result<Option<Taken>, Failure> {
    match pool {
        None => Ok(None),
        Some(pool) => pool.take(pool.free()?).map(Some),
    }
}

fn one_request(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    pool: &Option<Pool>,
    index: usize,
    (victim, address): (&str, u64),
) -> Outcome {
    let disk = &DISKS[index];
    let when = format!("{}, its {victim} private", disk.name);
    disk.start(guest, DATA_BYTES)?;
    disk.hold(guest, true)?;
    disk.works(scenario, guest, "before")?;
    let faults = number(guest, "stand-in-faults")?;
    let refused = number(guest, "access-refused")?;

    let offered = disk.offer(guest, DATA_BYTES)?;
    guest.convert(scenario, address, HUGE, true)?;
    let taken = drained(pool)?;
    scenario.check(
        victim == "rings"
            || !disk
                .device()
                .wait(&mut guest.monitor, offered, Duration::ZERO)?,
        format!("{when}: the request is still in flight"),
    )?;
    disk.hold(guest, false)?;
    if victim == "rings" {
        let deadline = Instant::now() + PATIENCE;
        while number(guest, "access-refused")? == refused && Instant::now() < deadline {}
    } else {
        let answered = disk.device().wait(&mut guest.monitor, offered, PATIENCE)?;
        alive(scenario, guest, &when)?;
        scenario.check(answered, format!("{when}: the request ends"))?;
        if victim == "data" {
            let status = disk.status(guest)?;
            scenario.fact(&format!("{when}: status"), status);
        }
    }
    alive(scenario, guest, &when)?;
    let faults = number(guest, "stand-in-faults")? - faults;
    scenario.fact(&format!("{when}: accesses without memory"), faults);
    drop(taken);
    guest.convert(scenario, address, HUGE, false)?;
    scenario.check_equal(
        number(guest, "stand-ins")?,
        0,
        format!("{when}: stand-ins once all is shared"),
    )?;
    disk.start(guest, DATA_BYTES)?;
    disk.works(scenario, guest, "after")?;
    disk.device().stop(&mut guest.monitor)?;
    scenario.progress(&when);
    Ok(())
}

/// The main loop touches a private page while both processors convert others of the block.
fn busy_elsewhere(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    pool: &Option<Pool>,
) -> Outcome {
    const PAGES: u64 = 512;
    const CONVERSIONS: u64 = 4000;
    const QUERIES: u32 = 10;
    let disk = &DISKS[MAIN_LOOP];
    disk.start(guest, DATA_BYTES)?;
    disk.hold(guest, true)?;
    disk.works(scenario, guest, "before conversions elsewhere")?;
    let offered = disk.offer(guest, DATA_BYTES)?;
    guest.convert(scenario, STATUS, HUGE, true)?;
    let taken = drained(pool)?;
    let (faults, waits) = (
        number(guest, "stand-in-faults")?,
        number(guest, "stand-in-waits")?,
    );
    let converted = number(guest, "to-private")?;
    let begun = guest.monitor.begin(&format!(
        "bench-two {ELSEWHERE:#x} {PAGES} {PAGES} {CONVERSIONS} 7"
    ))?;
    while number(guest, "to-private")? == converted {}
    disk.hold(guest, false)?;
    let mut slowest = Duration::ZERO;
    for _ in 0..QUERIES {
        let asked = Instant::now();
        guest.machine.qmp.execute("query-status", json!({}))?;
        slowest = slowest.max(asked.elapsed());
    }
    let during = number(guest, "to-private")? - converted;
    guest.monitor.end(begun)?;
    scenario.check(
        number(guest, "to-private")? - converted > during,
        "both processors were still converting when the monitor had answered",
    )?;
    let answered = disk.device().wait(&mut guest.monitor, offered, PATIENCE)?;
    scenario.check(
        answered,
        "the main loop ended its request beside conversions elsewhere",
    )?;
    scenario.check(
        number(guest, "stand-in-faults")? > faults,
        "the main loop met a page without memory",
    )?;
    scenario.check_equal(
        number(guest, "stand-in-waits")?,
        waits,
        "times that a thread waited for a conversion elsewhere",
    )?;
    scenario.fact("conversions elsewhere meanwhile", during);
    scenario.fact(
        "slowest answer of the monitor meanwhile, ms",
        slowest.as_millis() as u64,
    );
    drop(taken);
    disk.device().stop(&mut guest.monitor)?;
    guest.convert(scenario, STATUS, HUGE, false)
}

/// Threads touch the very page that a processor converts to and fro.
fn under_conversion(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    const TURNS: u64 = 300;
    let waits = number(guest, "stand-in-waits")?;
    for index in [0, MAIN_LOOP, OF_TWO[0], OF_TWO[1]] {
        let disk = &DISKS[index];
        disk.start(guest, DATA_BYTES)?;
        disk.hold(guest, true)?;
        disk.works(scenario, guest, "before its status is converted")?;
        let offered = disk.offer(guest, DATA_BYTES)?;
        let begun = guest.monitor.begin_flip(TURNS, STATUS, HUGE, HUGE, 1)?;
        let converted = number(guest, "to-private")?;
        while number(guest, "to-private")? == converted {}
        disk.hold(guest, false)?;
        let results = guest.monitor.end_flip(begun)?;
        scenario.check_equal(
            results,
            vec![(0, 2 * TURNS)],
            "results of conversions of a page that a device touches",
        )?;
        let answered = disk.device().wait(&mut guest.monitor, offered, PATIENCE)?;
        scenario.check(
            answered,
            format!("{} ended its request beside conversions there", disk.name),
        )?;
        alive(scenario, guest, "after conversions of its status")?;
        disk.works(scenario, guest, "after its status was converted")?;
        disk.device().stop(&mut guest.monitor)?;
    }
    let waits = number(guest, "stand-in-waits")? - waits;
    scenario.fact("waits for conversions of the page that was touched", waits);
    scenario.check_equal(
        number(guest, "stand-ins")?,
        0,
        "stand-ins after conversions of a page that a device touches",
    )
}

/// Waits for an answer as long as QEMU meets more pages without memory: each takes it some system calls.
fn answered_in_the_end(
    guest: &mut Confidential,
    disk: &Disk,
    offered: u64,
) -> Result<bool, Failure> {
    let mut met = number(guest, "stand-in-faults")?;
    loop {
        let answered = disk
            .device()
            .wait(&mut guest.monitor, offered, PATIENCE / 4)?;
        let before = met;
        met = number(guest, "stand-in-faults")?;
        if answered || met == before {
            return Ok(answered);
        }
    }
}

/// As many private pages, each by itself, as would need more mappings than the process may have.
fn scattered(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    const PAGES: u64 = 4096;
    const BYTES: u64 = 2 * PAGES * PAGE;
    let limit = fs::read_to_string(MAX_MAP_COUNT).attempt(|| format!("reading {MAX_MAP_COUNT}"))?;
    let set = |value: &str| {
        fs::write(MAX_MAP_COUNT, value).attempt(|| format!("writing {MAX_MAP_COUNT}"))
    };
    let disk = &DISKS[0];
    disk.start(guest, BYTES)?;
    disk.hold(guest, true)?;
    disk.works(scenario, guest, "before many single pages")?;
    let offered = disk.offer(guest, BYTES)?;
    let results = guest.monitor.storm(PAGES, DATA, PAGE, true, 2 * PAGE)?;
    scenario.check_equal(results, vec![(0, PAGES)], "results of single pages")?;
    let faults = number(guest, "stand-in-faults")?;
    set(&FEW_MAPPINGS.to_string())?;
    disk.hold(guest, false)?;
    let answered = answered_in_the_end(guest, disk, offered);
    let there = memory::mappings(guest.machine.pid());
    set(limit.trim())?;
    let met = number(guest, "stand-in-faults")? - faults;
    scenario.check(
        answered?,
        format!("the iothread ended a request of many single private pages, {met} of which it met"),
    )?;
    alive(scenario, guest, "after many single private pages")?;
    let faults = number(guest, "stand-in-faults")? - faults;
    let stand_ins = number(guest, "stand-ins")?;
    scenario.fact("scattered pages: accesses without memory", faults);
    scenario.fact("scattered pages: stand-ins", stand_ins);
    scenario.fact("scattered pages: mappings of QEMU", there?.len());
    scenario.check(
        faults >= PAGES && stand_ins <= MOST_STAND_INS,
        format!("of {faults} pages at most {MOST_STAND_INS} have stand-ins: {stand_ins}"),
    )?;
    guest.convert(scenario, DATA, BYTES, false)?;
    scenario.check_equal(
        number(guest, "stand-ins")?,
        0,
        "stand-ins once all of the single pages are shared",
    )?;
    disk.start(guest, DATA_BYTES)?;
    disk.works(scenario, guest, "after many single pages")
}
