// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dumps in the background: one after the other, a reset in the middle, the end of QEMU in the middle.

use super::*;
use crate::host::memory::SharedFile;
use crate::machine::Machine;
use crate::monitor::Monitor;
use crate::qmp::Gmem;
use crate::secrets;
use crate::vmcore::Core;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

const EVENT_PATIENCE: Duration = Duration::from_secs(120);
const EXIT_PATIENCE: Duration = Duration::from_secs(120);
const TIMES: usize = 12;

/// Whoever hears of the end may begin the next one at once.
pub fn one_after_the_other(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let path = dump_file();
    forget_ends(&mut guest.machine.qmp)?;
    for _ in 0..TIMES {
        let more = [
            ("detach", json!(true)),
            ("begin", json!(MIDDLE - 2 * PAGE)),
            ("length", json!(4 * PAGE)),
        ];
        guest
            .machine
            .qmp
            .execute("dump-guest-memory", arguments(&path, &more))?;
        let event = guest.machine.qmp.event("DUMP_COMPLETED", EVENT_PATIENCE)?;
        scenario.check_equal(
            event["data"]["result"]["status"].as_str(),
            Some("completed"),
            format!("the end of a dump in the background: {event}"),
        )?;
    }
    let arguments = arguments(&path, &[("detach", json!(true))]);
    without_allocating(scenario, guest, "in the background", |guest| {
        guest.machine.qmp.execute("dump-guest-memory", arguments)?;
        guest.machine.qmp.event("DUMP_COMPLETED", EVENT_PATIENCE)
    })?;
    let core = Core::elf(&path)?;
    files::is_right(scenario, guest, "in the background", &core, &ram(guest))?;
    scenario.fact("in the background, one after the other", TIMES);
    scenario.check_equal(status(guest)?, "running".into(), "status after dumps")
}

/// A dump that does not go on before somebody reads it.
struct Stuck(File);

impl Stuck {
    fn begin(qmp: &mut Qmp) -> Result<Self, Failure> {
        let path = dump_file().with_extension("pipe");
        let _ = fs::remove_file(&path);
        let name = CString::new(path.as_os_str().as_bytes()).attempt(|| "naming a pipe".into())?;
        // SAFETY: a string that ends with a NUL and outlives the call.
        if unsafe { libc::mkfifo(name.as_ptr(), 0o600) } != 0 {
            return Err(std::io::Error::last_os_error()).attempt(|| "making a pipe".into());
        }
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let pipe = options.open(&path).attempt(|| "opening a pipe".into())?;
        let arguments = arguments(&path, &[("detach", json!(true))]);
        forget_ends(qmp)?;
        qmp.execute("dump-guest-memory", arguments)?;
        // SAFETY: plain fcntl on a descriptor that is open.
        if unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETFL, 0) } != 0 {
            return Err(std::io::Error::last_os_error()).attempt(|| "waiting at a pipe".into());
        }
        let answer = qmp.execute("query-dump", json!({}))?;
        match answer["status"].as_str() {
            Some("active") => Ok(Self(pipe)),
            _ => Err(Failure::new(format!("the dump is not under way: {answer}"))),
        }
    }

    /// All that is left of it.
    fn rest(mut self) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        self.0
            .read_to_end(&mut bytes)
            .attempt(|| "reading a dump from a pipe".into())?;
        Ok(bytes)
    }
}

/// The chipset's memory hot-plug controller (ACPI): selects a slot, and by bit 3 ejects from it.
const EJECT: [&str; 2] = ["o /4 0xa00 0", "o /1 0xa14 8"];

/// Memory that comes and goes, also in the middle of a dump of it.
pub fn unplug(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    const BYTES: u64 = 16 * MIB;
    guest.machine.qmp.execute(
        "object-add",
        json!({"qom-type": "memory-backend-gmem", "id": "mem1", "size": BYTES}),
    )?;
    guest.machine.qmp.execute(
        "device_add",
        json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "mem1"}),
    )?;
    let address = json!({"path": "/machine/peripheral/dimm0", "property": "addr"});
    let address = guest.machine.qmp.execute("qom-get", address)?;
    let gpa = address
        .as_u64()
        .attempt(|| format!("the module's address is no number: {address}"))?;
    guest.ledger.plug(Block::small("mem1", BYTES), gpa);
    let file = SharedFile::open(guest.machine.pid(), BYTES)?;
    guest.shared.push(file);
    guest.fill(gpa, BYTES, SHARED_SEED)?;
    guest.convert(scenario, gpa + MIB, MIB, true)?;
    guest.fill(gpa + MIB, MIB, SECRET_SEED)?;

    let path = dump_file();
    let whole = arguments(&path, &[]);
    without_allocating(scenario, guest, "plugged", |guest| {
        let arguments = whole.clone();
        guest.machine.qmp.execute("dump-guest-memory", arguments)
    })?;
    let core = Core::elf(&path)?;
    files::is_right(scenario, guest, "plugged", &core, &ram(guest))?;

    let stuck = Stuck::begin(&mut guest.machine.qmp)?;
    guest
        .machine
        .qmp
        .execute("device_del", json!({"id": "dimm0"}))?;
    for write in EJECT {
        guest.machine.qmp.human(write)?;
    }
    guest.machine.qmp.event("DEVICE_DELETED", EVENT_PATIENCE)?;
    guest
        .machine
        .qmp
        .execute("object-del", json!({"id": "mem1"}))?;
    fs::write(&path, stuck.rest()?).attempt(|| format!("writing {}", path.display()))?;
    let event = guest.machine.qmp.event("DUMP_COMPLETED", EVENT_PATIENCE)?;
    scenario.check_equal(
        event["data"]["result"]["status"].as_str(),
        Some("completed"),
        format!("the end of a dump of memory that goes meanwhile: {event}"),
    )?;
    let core = Core::elf(&path)?;
    let what = "unplugged in the middle of a dump";
    files::is_right(scenario, guest, what, &core, &ram(guest))?;
    scenario.fact(what, "the dump has it as it was");

    guest.ledger.unplug();
    guest.shared.pop();
    guest.machine.qmp.execute("dump-guest-memory", whole)?;
    let core = Core::elf(&path)?;
    files::is_right(scenario, guest, "unplugged", &core, &ram(guest))?;
    let gone = core.ranges().iter().all(|range| range.end <= gpa);
    scenario.check(gone, "what was unplugged is in no dump")?;
    let deadline = Instant::now() + EVENT_PATIENCE;
    while Gmem::query(&mut guest.machine.qmp)?.block("mem1").is_ok() {
        scenario.check(
            Instant::now() < deadline,
            "what was unplugged is freed in the end",
        )?;
    }
    guest.agree(scenario, "unplugged")
}

/// A reset in the middle of a dump: the dump fails, and the guest starts anew.
pub fn reset(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let stuck = Stuck::begin(&mut guest.machine.qmp)?;
    for command in ["cont", "stop"] {
        let answer = guest.machine.qmp.try_execute(command, json!({}))?;
        scenario.check(
            answer.is_err(),
            format!("{command} is refused while memory is dumped"),
        )?;
    }
    let path = dump_file();
    let answer = guest
        .machine
        .qmp
        .try_execute("dump-guest-memory", arguments(&path, &[]))?;
    scenario.check(answer.is_err(), "a second dump is refused")?;

    guest.machine.qmp.execute("system_reset", json!({}))?;
    guest.machine.qmp.event("RESET", EVENT_PATIENCE)?;
    let bytes = stuck.rest()?;
    let event = guest.machine.qmp.event("DUMP_COMPLETED", EVENT_PATIENCE)?;
    scenario.fact(
        "a reset in the middle of a dump",
        event["data"]["error"].clone(),
    );
    scenario.check_equal(
        event["data"]["result"]["status"].as_str(),
        Some("failed"),
        format!("the end of a dump with a reset in it: {event}"),
    )?;
    scenario.check(!bytes.is_empty(), "the dump was under way")?;
    // By what was private when it was begun.
    files::no_secret(scenario, guest, "a dump with a reset in it", &bytes)?;

    guest.monitor.wait_until_ready()?;
    guest.monitor.ask("ping")?;
    guest.ledger.reset();
    guest.reopen()?;
    scenario.check_equal(status(guest)?, "running".into(), "status after the reset")?;
    guest.fill(MIDDLE, MIB, SHARED_SEED)?;
    guest.agree(scenario, "after a reset in the middle of a dump")
}

/// QEMU ends in the middle of a dump that nobody reads, and of one that somebody does.
pub fn quit(scenario: &mut Scenario, guest: Confidential) -> Outcome {
    let mut guest = guest;
    let stuck = Stuck::begin(&mut guest.machine.qmp)?;
    guest.machine.qmp.execute("quit", json!({}))?;
    guest.machine.wait_for_exit(EXIT_PATIENCE)?;
    drop(stuck);
    scenario.check_equal(
        guest.private_allocated()?,
        0,
        "bytes in guest_memfds after QEMU's end",
    )?;
    drop(guest);

    let mut guest = start(&scenario.directory().join("quit"), &[])?;
    prepare(scenario, &mut guest)?;
    let stuck = Stuck::begin(&mut guest.machine.qmp)?;
    let reader = std::thread::spawn(move || stuck.rest());
    guest.machine.qmp.execute("quit", json!({}))?;
    guest.machine.wait_for_exit(EXIT_PATIENCE)?;
    let bytes = reader
        .join()
        .map_err(|_| Failure::new("the reader of a dump died"))??;
    scenario.fact("quit in the middle of a dump", "QEMU ends with success");
    files::no_secret(scenario, &guest, "a dump that QEMU's end cut off", &bytes)
}

/// RAM that a reset makes private as a whole, in the middle of a dump of what was shared of it.
pub fn all_private(scenario: &mut Scenario) -> Outcome {
    const BYTES: u64 = 48 * MIB;
    const OPEN: u64 = 2 * MIB;
    const OPEN_BYTES: u64 = 2 * MIB;
    const SHARED: u64 = 8 * MIB;
    const SHARED_BYTES: u64 = 8 * MIB;
    let (mut machine, serial) = Machine::start(
        &scenario.directory().join("all-private"),
        &[
            "-object",
            &format!(
                "sw-protected-guest,id=cgs0,ram=private,shared-base={OPEN},shared-size={OPEN_BYTES},image=/lab/l2/payload.elf"
            ),
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={BYTES}"),
            "-m",
            &format!("{}M", BYTES / MIB),
            "-machine",
            "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0",
        ],
    )?;
    let mut monitor = Monitor::new(serial)?;
    let block = Block::small("ram0", BYTES);
    let mut ledger = Ledger::new(vec![block]);
    ledger.convert(0, BYTES, true);
    ledger.convert(OPEN, OPEN_BYTES, false);
    monitor.fill(MIDDLE, MIB, SECRET_SEED)?;

    let path = dump_file();
    for format in ["elf", "kdump-zlib"] {
        let arguments = arguments(&path, &[("format", json!(format))]);
        machine.qmp.execute("dump-guest-memory", arguments)?;
        let core = match format {
            "elf" => Core::elf(&path)?,
            _ => Core::kdump(&path, false)?,
        };
        let mut ranges = core.ranges();
        // Below are the ROMs of the machine.
        ranges.retain(|range| (FIRST..BYTES).contains(&range.start));
        scenario.check(
            matches!(ranges.as_slice(), [open] if *open == (OPEN..OPEN + OPEN_BYTES)),
            format!("{format}: the dump is of the range that is shared: {ranges:x?}"),
        )?;
        let found = secrets::find(core.memory(), &ledger, SEEDS);
        scenario.check_equal(found, None, format!("{format}: private words"))?;
    }
    let more = [("begin", json!(MIDDLE)), ("length", json!(MIB))];
    let answer = machine
        .qmp
        .try_execute("dump-guest-memory", arguments(&path, &more))?;
    scenario.check(answer.is_err(), "a dump of private pages alone is refused")?;

    let result = monitor.convert(SHARED, SHARED_BYTES, false)?;
    scenario.check_equal(result, 0, "result of to-shared")?;
    monitor.fill(SHARED, SHARED_BYTES, SHARED_SEED)?;
    let stuck = Stuck::begin(&mut machine.qmp)?;
    machine.qmp.execute("system_reset", json!({}))?;
    machine.qmp.event("RESET", EVENT_PATIENCE)?;
    let bytes = stuck.rest()?;
    let event = machine.qmp.event("DUMP_COMPLETED", EVENT_PATIENCE)?;
    scenario.check_equal(
        event["data"]["result"]["status"].as_str(),
        Some("failed"),
        format!("the end of a dump with a reset in it: {event}"),
    )?;
    scenario.check_equal(
        secrets::find(&bytes, &ledger, SEEDS),
        None,
        "private words in a dump with a reset in it",
    )?;
    monitor.wait_until_ready()?;
    monitor.ask("ping")?;
    scenario.fact("a reset that takes what is dumped", "ends the dump");
    monitor.power_off()?;
    machine.wait_for_exit(EXIT_PATIENCE)
}
