// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest's VM is made anew while its CD-ROM is in the middle of a read that QEMU serves in several parts. The reset neither
//! waits for ever nor lets the old guest's bytes arrive in the new one's memory.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::{Attempt, Failure};
use crate::monitor::protocol::pattern;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
const TARGET: u64 = 32 * MIB;
const READ_BYTES: u64 = MIB;
/// What QEMU reads at a time for a CD-ROM that does DMA.
const PART_BYTES: u64 = 128 << 10;
const NOTHING: &str = "0x0";
const AFTERWARDS: Duration = Duration::from_secs(1);
const SEED: u64 = 41;
const DISC: &str = "cd0";
/// Parts per second: a read takes long enough for a reset to come in between on any machine.
const SLOW: u64 = 1;
const PATIENCE: Duration = Duration::from_secs(180);

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let image = std::env::temp_dir().join("disc");
    write_disc(&image)?;
    let drive = format!(
        "if=none,id={DISC},media=cdrom,format=raw,readonly=on,file={}",
        image.display()
    );
    let mut guest = Confidential::with_one_block(
        scenario.directory(),
        RAM_BYTES,
        "",
        &[
            "-machine",
            "x-change-vmfd-on-reset=on",
            "-drive",
            &drive,
            "-device",
            "piix3-ide,id=ide",
            "-device",
            &format!("ide-cd,bus=ide.1,drive={DISC},id=cd"),
        ],
    )?;
    once(scenario, &mut guest)?;
    guest.finish(scenario)
}

fn write_disc(path: &Path) -> Outcome {
    let words = (0..READ_BYTES).step_by(8).map(|at| pattern(SEED, at));
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    fs::write(path, bytes).attempt(|| format!("writing {}", path.display()))
}

/// How many parts per second the disc serves; 0: as many as it can.
fn throttle(guest: &mut Confidential, parts: u64) -> Outcome {
    let limits = json!({
        "id": "cd", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": parts, "iops_rd": 0, "iops_wr": 0,
    });
    guest
        .machine
        .qmp
        .execute("block_set_io_throttle", limits)
        .map(|_| ())
}

/// The word that the guest finds there.
fn word(guest: &mut Confidential, address: u64) -> Result<String, Failure> {
    let words = guest.monitor.ask(&format!("read64 {address:#x}"))?;
    let word = words.first().attempt(|| "the guest read nothing".into())?;
    Ok(word.clone())
}

fn once(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    guest.monitor.zero(TARGET, READ_BYTES)?;
    guest.monitor.begin_cd_read(TARGET, READ_BYTES)?;
    let ended = guest.monitor.cd_ends_within(PATIENCE)?;
    scenario.check(ended, "the CD-ROM reads")?;
    let arrived = guest.monitor.check_copy(TARGET, READ_BYTES, SEED, 0)?;
    scenario.check_equal(arrived, None, "what the CD-ROM read is what is on the disc")?;

    throttle(guest, SLOW)?;
    guest.monitor.zero(TARGET, READ_BYTES)?;
    guest.monitor.begin_cd_read(TARGET, READ_BYTES)?;
    while word(guest, TARGET)? == NOTHING {}
    scenario.check_equal(
        word(guest, TARGET + READ_BYTES - PART_BYTES)?.as_str(),
        NOTHING,
        "what is where the last part goes when the first has arrived",
    )?;
    let begin = Instant::now();
    guest.machine.qmp.execute("system_reset", json!({}))?;
    guest.machine.qmp.event("RESET", PATIENCE)?;
    scenario.fact("reset took ms", begin.elapsed().as_millis() as u64);
    guest.monitor.wait_until_ready()?;
    guest.monitor.ask("ping")?;
    guest.ledger.reset();
    guest.reopen()?;

    throttle(guest, 0)?;
    for _ in 0..2 {
        let difference = guest.monitor.zeros(TARGET, READ_BYTES)?;
        scenario.check_equal(
            difference,
            None,
            "what the new guest finds where the old one read to",
        )?;
        // A part that was still to come would have come by then.
        thread::sleep(AFTERWARDS);
    }
    scenario.fact("the read of before", "left nothing in the new memory");
    guest.fill(TARGET, READ_BYTES, 42)?;
    guest.agree(scenario, "after the reset")
}
