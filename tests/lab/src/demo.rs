// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo lab demo` and `cargo lab shell`.

use crate::mode::{self, Mode};
use crate::prepare::{self, Ground, Prepared};
use crate::session::Session;
use crate::tally::Verdict;
use crate::{cache, images::Images, machine, nvme, one_binary, report, ui};
use anyhow::{bail, Context, Result};
use std::io::IsTerminal;
use std::time::Instant;

/// Why nothing runs in that mode.
pub const NO_IN_PLACE: &str =
    "this kernel has none of that: it was built without tests/lab/kernel-patches";

/// Runs every scenario; says whether all went well.
pub fn run(ground: &Ground, patience: f64) -> Result<bool> {
    let start = Instant::now();
    let results = ground.tree.results();
    std::fs::create_dir_all(&results)
        .with_context(|| format!("can't create {}", results.display()))?;
    let _results = results_lock(ground)?;
    let prepared = {
        let _cache = ground.cache.lock()?;
        prepare::prepare(ground)?
    };
    let ready = start.elapsed();
    let path = results.join("report.json");
    // A report of an earlier run must not be taken for one of this.
    let _ = std::fs::remove_file(&path);
    let mut runs = mode::demonstrated();
    if !runs.iter().all(|run| prepared.kernel.offers(run.mode)) {
        runs.retain(|run| prepared.kernel.offers(run.mode));
        ui::note(NO_IN_PLACE);
    }
    let outcomes = session(ground, &prepared, &prepared.images, patience)
        .run(&runs, |_, outcome| ui::line(&outcome.line()))?;
    report::write(&outcomes, &path)?;
    ui::line(&report::table(&outcomes));
    let one_binary = match one_binary::verdict(&outcomes) {
        None => true,
        Some(Verdict::Failed(why)) => {
            ui::line(&format!("{}: no, {why}", one_binary::NAME));
            false
        }
        Some(_) => {
            ui::line(&format!("{}: yes, by build id", one_binary::NAME));
            true
        }
    };
    ui::line(&format!(
        "prepared in {}, all in {}; facts in {}",
        ui::duration(ready),
        ui::duration(start.elapsed()),
        relative(ground, &path)
    ));
    Ok(one_binary && outcomes.iter().all(|outcome| outcome.ok))
}

/// An L1 on this terminal.
pub fn shell(ground: &Ground, in_place: bool) -> Result<()> {
    if !std::io::stdin().is_terminal() {
        bail!("the shell needs a terminal");
    }
    let results = ground.tree.results();
    std::fs::create_dir_all(&results)?;
    let _results = results_lock(ground)?;
    let prepared = {
        let _cache = ground.cache.lock()?;
        prepare::prepare(ground)?
    };
    if in_place && !prepared.kernel.offers(Mode::InPlace) {
        bail!(NO_IN_PLACE);
    }
    machine::require_memory(&machine::SMALL)?;
    let disk = nvme::Disk::create(&results.join("nvme.img"))?;
    ui::note("Ctrl-A X switches L1 off, Ctrl-A C changes between console and QEMU's monitor");
    machine::Machine {
        qemu: &prepared.qemu.binary,
        firmware: &prepared.firmware.share,
        images: &prepared.images,
        nvme: disk.path(),
        shape: machine::SMALL,
        mode: if in_place { Mode::InPlace } else { Mode::Split },
        words: &ground.choices.kernel_option,
        monitor: None,
    }
    .shell()
}

pub fn results_lock(ground: &Ground) -> Result<cache::Lock> {
    cache::lock(
        &ground.tree.results().join("lock"),
        "another `cargo lab` runs in this tree",
    )
}

pub fn session<'a>(
    ground: &'a Ground,
    prepared: &'a Prepared,
    images: &'a Images,
    patience: f64,
) -> Session<'a> {
    Session {
        qemu: &prepared.qemu.binary,
        firmware: &prepared.firmware.share,
        images,
        unpatched: None,
        results: ground.tree.results(),
        patience,
        shape: machine::SMALL,
        words: &ground.choices.kernel_option,
    }
}

fn relative(ground: &Ground, path: &std::path::Path) -> String {
    path.strip_prefix(ground.tree.root())
        .unwrap_or(path)
        .display()
        .to_string()
}
