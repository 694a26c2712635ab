// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dumps while the guest waits, and what is in the files.

use super::*;
use crate::machine::Machine;
use crate::monitor::protocol::pattern;
use crate::monitor::Monitor;
use crate::qmp::Gmem;
use crate::secrets;
use crate::vmcore::{Core, Part as Load};
use std::fs;
use std::time::Instant;

const EXIT_PATIENCE: Duration = Duration::from_secs(120);

/// A dump of all memory as ELF, which is to succeed.
fn elf(
    scenario: &Scenario,
    guest: &mut Confidential,
    what: &str,
    more: &[(&str, Value)],
) -> Result<Core, Failure> {
    let path = dump_file();
    let arguments = arguments(&path, more);
    without_allocating(scenario, guest, what, |guest| {
        guest.machine.qmp.execute("dump-guest-memory", arguments)
    })?;
    Core::elf(&path)
}

/// How long a dump takes, while everything is shared.
pub fn time(guest: &mut Confidential) -> Result<Duration, Failure> {
    let path = dump_file();
    let arguments = arguments(&path, &[]);
    let begin = Instant::now();
    guest.machine.qmp.execute("dump-guest-memory", arguments)?;
    Ok(begin.elapsed())
}

/// Elf, kdump, kdump as it is on disk; those that this QEMU does not have are refused.
pub fn every_format(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let path = dump_file();
    let said = guest
        .machine
        .qmp
        .execute("query-dump-guest-memory-capability", json!({}))?;
    let known: Vec<&str> = said["formats"]
        .as_array()
        .map(|formats| {
            formats
                .iter()
                .filter_map(|format| format.as_str())
                .collect()
        })
        .unwrap_or_default();
    for format in [
        "elf",
        "kdump-zlib",
        "kdump-raw-zlib",
        "kdump-lzo",
        "kdump-raw-lzo",
        "kdump-snappy",
        "kdump-raw-snappy",
        "win-dmp",
    ] {
        let arguments = arguments(&path, &[("format", json!(format))]);
        let answer = without_allocating(scenario, guest, format, |guest| {
            guest
                .machine
                .qmp
                .try_execute("dump-guest-memory", arguments)
        })?;
        scenario.check_equal(
            answer.is_ok(),
            known.contains(&format),
            format!("{format}: it works if QEMU says that it knows it: {answer:?}"),
        )?;
        let core = match (answer, format) {
            (Err(refusal), _) => {
                scenario.fact(&format!("{format} is refused"), refusal.description);
                continue;
            }
            (_, "elf") => Core::elf(&path)?,
            (_, "kdump-zlib") => Core::kdump(&path, false)?,
            (_, "kdump-raw-zlib") => Core::kdump(&path, true)?,
            // The same pages, in what we can't unpack.
            _ => continue,
        };
        scenario.fact(&format!("{format} bytes"), core.file_bytes);
        is_right(scenario, guest, format, &core, &ram(guest))?;
        if format == "elf" {
            let untouched = core.at(UNTOUCHED, UNTOUCHED_BYTES);
            scenario.check(
                untouched.is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0)),
                "elf: what the guest never touched is zeros",
            )?;
        } else {
            let file = fs::read(&path).attempt(|| format!("reading {}", path.display()))?;
            no_secret(scenario, guest, format, &file)?;
        }
    }
    let refused = guest.machine.qmp.try_execute(
        "dump-guest-memory",
        super::arguments(&path, &[("format", json!("win-dmp"))]),
    )?;
    let sentence = refused.err().map(|refusal| refusal.description);
    scenario.check(
        sentence
            .as_deref()
            .is_some_and(|text| text.contains("private memory")),
        format!("win-dmp is refused for what the guest is: {sentence:?}"),
    )?;
    let core = elf(scenario, guest, "paging", &[("paging", json!(true))])?;
    // QEMU extends the sign of all addresses, those of the lower half included.
    const ADDRESS: u64 = (1 << 48) - 1;
    let elsewhere = |load: &&Load| load.bytes > 0 && load.address & ADDRESS != load.gpa;
    scenario.check_equal(
        core.parts.iter().find(elsewhere),
        None,
        "paging: parts elsewhere than at the address where the guest maps them",
    )?;
    scenario.fact("paging program headers", core.parts.len());
    is_right(scenario, guest, "paging", &core, &ram(guest))
}

/// begin and length.
pub fn parts(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let end = MIDDLE + MIDDLE_BYTES;
    let tail = HIGH + RAM1_BYTES - RAM1_LOW_BYTES;
    for (what, range) in [
        ("from private to shared", end - 3 * PAGE..end + 7 * PAGE),
        ("from shared to private", MIDDLE - 2 * PAGE..MIDDLE + PAGE),
        ("from shared to shared", MIDDLE - PAGE..end + PAGE),
        ("in the middle of pages", MIDDLE - PAGE + 0x123..end + 0x234),
        ("single pages", SINGLES..SINGLES + 2 * SINGLES_COUNT * PAGE),
        ("two blocks", SEAM - PAGE..SEAM + SEAM_BYTES + PAGE),
        ("both sides of the hole", LOW_BYTES - PAGE..HIGH + PAGE),
        ("beyond the end", tail - PAGE..tail + GIB),
    ] {
        let filter = [
            ("begin", json!(range.start)),
            ("length", json!(range.end - range.start)),
        ];
        for paging in [false, true] {
            let what = format!("{what}, {}", if paging { "paging" } else { "plain" });
            let mut more = filter.to_vec();
            more.push(("paging", json!(paging)));
            let core = elf(scenario, guest, &what, &more)?;
            is_right(scenario, guest, &what, &core, std::slice::from_ref(&range))?;
        }
    }
    for (what, begin, length) in [
        ("all private", MIDDLE as i64, PAGE as i64),
        ("no memory", 2 * GIB as i64, PAGE as i64),
        ("empty", MIDDLE as i64, 0),
        ("negative", -1, PAGE as i64),
        ("of negative length", MIDDLE as i64, -4096),
        ("wrapping", i64::MAX, i64::MAX),
    ] {
        let path = dump_file();
        let filter = [("begin", json!(begin)), ("length", json!(length))];
        let arguments = arguments(&path, &filter);
        let answer = guest
            .machine
            .qmp
            .try_execute("dump-guest-memory", arguments)?;
        let sentence = answer.err().map(|refusal| refusal.description);
        scenario.check(
            sentence.is_some(),
            format!("a range that is {what} is refused"),
        )?;
        scenario.fact(&format!("a range that is {what}"), sentence);
        scenario.check_equal(status(guest)?, "running".into(), "status after a refusal")?;
    }
    Ok(())
}

/// How often the library is asked, and how long a dump takes now.
pub fn questions(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    all_shared: Duration,
) -> Outcome {
    /// A block appears in pieces: the holes below 1 MiB.
    const PIECES: u64 = 32;
    let count = |guest: &Confidential| {
        let text = guest.machine.complaints();
        text.matches("qemu_gmem_get_run ").count() as u64
    };
    let before = count(guest);
    let mixed = time(guest)?;
    let asked = count(guest) - before;
    let runs: u64 = (0..guest.ledger.blocks.len())
        .map(|block| 2 * guest.ledger.private_runs(block).len() as u64)
        .sum();
    let per_gib = |time: Duration, bytes: u64| {
        (time.as_millis() as u64 * GIB)
            .checked_div(bytes)
            .unwrap_or_default()
    };
    let all = RAM0_BYTES + RAM1_BYTES;
    scenario.fact("questions for a dump", asked);
    scenario.fact("runs of pages", runs);
    scenario.fact("ms per GiB, all shared", per_gib(all_shared, all));
    scenario.fact("ms per GiB, mixed", per_gib(mixed, shared_bytes(guest)));
    scenario.check(
        asked > 0 && asked <= runs + PIECES,
        format!(
            "a dump asks once per run: {asked} questions for {runs} runs of {} pages",
            all / PAGE
        ),
    )
}

/// All but the payload's own pages is private.
pub fn nearly_all_private(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    for range in ram(guest) {
        let first = range.start.max(4 * MIB);
        guest.convert(scenario, first, range.end - first, true)?;
    }
    guest.fill(MIDDLE, MIB, SECRET_SEED)?;
    guest.fill(HIGH, MIB, SECRET_SEED)?;
    let core = elf(scenario, guest, "nearly all private", &[])?;
    is_right(scenario, guest, "nearly all private", &core, &ram(guest))?;
    for range in ram(guest) {
        let first = range.start.max(4 * MIB);
        guest.convert(scenario, first, range.end - first, false)?;
    }
    Ok(())
}

/// What is in the file: all that is shared of these ranges, as the guest wrote it, and nothing private.
pub fn is_right(
    scenario: &Scenario,
    guest: &mut Confidential,
    what: &str,
    core: &Core,
    ranges: &[Range<u64>],
) -> Outcome {
    let all = super::ram(guest);
    let mut expected: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        for range in all.iter().filter_map(|ram| common(ram, range)) {
            let mut at = range.start;
            while at < range.end {
                let end = (at / PAGE * PAGE + PAGE).min(range.end);
                match expected.last_mut() {
                    _ if guest.ledger.is_private(at) => {}
                    Some(last) if last.end == at => last.end = end,
                    _ => expected.push(at..end),
                }
                at = end;
            }
        }
    }
    let found: Vec<_> = core
        .ranges()
        .iter()
        .flat_map(|range| all.iter().filter_map(|ram| common(ram, range)))
        .collect();
    scenario.check(
        found == expected,
        format!(
            "{what}: the dump is of what is shared: {}",
            first_difference(&found, &expected)
        ),
    )?;

    let mut compared = 0;
    let contents = guest.ledger.contents();
    for part in &core.parts {
        let bytes = core.contents(part);
        for &(gpa, length, seed) in &contents {
            let of_part = part.gpa..part.gpa + part.bytes;
            let Some(words) = common(&(gpa..gpa + length), &of_part).map(whole_words) else {
                continue;
            };
            for at in words.clone().step_by(8) {
                let from = (at - part.gpa) as usize;
                if bytes[from..from + 8] != pattern(seed, at).to_le_bytes() {
                    let rule = format!("{what}: the dump has what the guest wrote to {at:#x}");
                    scenario.check(false, rule)?;
                }
            }
            compared += words.end - words.start;
        }
    }
    let mut known = 0;
    for (gpa, bytes, _) in contents {
        let of_guest = gpa..gpa + bytes;
        let both = expected.iter().filter_map(|range| common(range, &of_guest));
        known += both
            .map(whole_words)
            .map(|words| words.end - words.start)
            .sum::<u64>();
    }
    scenario.check(
        compared >= known,
        format!("{what}: {compared:#x} bytes were compared, {known:#x} are known"),
    )?;
    guest.compared_bytes += compared;
    no_secret(scenario, guest, what, core.memory())
}

pub fn no_secret(scenario: &Scenario, guest: &Confidential, what: &str, bytes: &[u8]) -> Outcome {
    let found = secrets::find(bytes, &guest.ledger, SEEDS);
    scenario.check_equal(
        found,
        None,
        format!("{what}: a private word in it, and where the guest wrote that"),
    )
}

fn common(one: &Range<u64>, other: &Range<u64>) -> Option<Range<u64>> {
    let both = one.start.max(other.start)..one.end.min(other.end);
    (both.start < both.end).then_some(both)
}

fn whole_words(range: Range<u64>) -> Range<u64> {
    let start = range.start.next_multiple_of(8);
    start..(range.end / 8 * 8).max(start)
}

fn first_difference(found: &[Range<u64>], expected: &[Range<u64>]) -> String {
    let at = found
        .iter()
        .zip(expected)
        .take_while(|(one, other)| one == other)
        .count();
    format!(
        "{:x?} where {:x?} was expected, {} ranges of {}",
        found.get(at),
        expected.get(at),
        found.len(),
        expected.len()
    )
}

/// An ordinary guest's memory is in a guest_memfd, too, where a look allocates.
pub fn ordinary(scenario: &mut Scenario) -> Outcome {
    const BYTES: u64 = 64 * MIB;
    let (mut machine, serial) = Machine::start(
        &scenario.directory().join("ordinary"),
        &[
            "-kernel",
            crate::place::payload(),
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={BYTES}"),
            "-m",
            &format!("{}M", BYTES / MIB),
            "-machine",
            "q35,accel=kvm,memory-backend=ram0",
        ],
    )?;
    let mut monitor = Monitor::new(serial)?;
    monitor.fill(MIDDLE, MIB, SHARED_SEED)?;
    let allocated = |machine: &Machine| -> Result<u64, Failure> {
        let pages = crate::host::shared_pages::SharedPages::of(machine.pid(), BYTES)?;
        pages.allocated()
    };
    let before = allocated(&machine)?;
    let path = dump_file();
    for format in ["elf", "kdump-zlib"] {
        let arguments = arguments(&path, &[("format", json!(format))]);
        machine.qmp.execute("dump-guest-memory", arguments)?;
        let core = match format {
            "elf" => Core::elf(&path)?,
            _ => Core::kdump(&path, false)?,
        };
        let bytes: Vec<u8> = (MIDDLE..MIDDLE + MIB)
            .step_by(8)
            .flat_map(|at| pattern(SHARED_SEED, at).to_le_bytes())
            .collect();
        let found: Vec<u8> = (MIDDLE..MIDDLE + MIB)
            .step_by(PAGE as usize)
            .filter_map(|page| core.at(page, PAGE))
            .flatten()
            .copied()
            .collect();
        scenario.check(
            found == bytes,
            format!("{format}: the dump has what the guest wrote"),
        )?;
        scenario.check_equal(
            allocated(&machine)?,
            before,
            format!("{format}: bytes of the guest_memfd after a dump"),
        )?;
    }
    scenario.fact("bytes of the guest_memfd", before);
    scenario.fact(
        "quarantined",
        Gmem::query(&mut machine.qmp)?.sum("quarantined")?,
    );
    monitor.power_off()?;
    machine.wait_for_exit(EXIT_PATIENCE)
}
