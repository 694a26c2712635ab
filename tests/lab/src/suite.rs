// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo lab test`: the workspace's tests, then the scenarios; with `--full` also what shows that lab and series are sound.

use crate::full::Selection;
use crate::in_l1::{self, Native, Program};
use crate::kernel::Kernel;
use crate::mode::{self, Mode, Run, PROGRAMS};
use crate::prepare::{self, Ground, Prepared};
use crate::report::Outcome;
use crate::session::Session;
use crate::tally::{wanted, Tally, Verdict};
use crate::{cargo_tests, demo, host, host_folder, interrupt, kernel, one_binary, report, ui};
use anyhow::{Context, Result};

/// Runs what the filter lets through; says whether nothing failed.
pub fn run(ground: &Ground, filter: Option<&str>, full: bool, patience: f64) -> Result<bool> {
    let results = ground.tree.results();
    std::fs::create_dir_all(&results)
        .with_context(|| format!("can't create {}", results.display()))?;
    let _results = demo::results_lock(ground)?;
    host::prepare(&ground.logs)?;

    let mut tally = Tally::default();
    let mut scenarios = mode::tested();
    let mut native = Native::all();
    if full {
        scenarios.extend(mode::tested_foreign());
        scenarios.extend(mode::tested_unpatched());
    } else {
        native.retain(|native| !native.mode.is_for_full());
    }
    scenarios.retain(|run| wanted(filter, &scenario_name(&run.name())));
    native.retain(|native| wanted(filter, &native.name()));
    let full = full.then(|| Selection::new(ground, filter)).transpose()?;
    // QEMU's tests have names that only a build knows, so with --full any filter may mean some of them.
    let needs_lab = !scenarios.is_empty()
        || !native.is_empty()
        || full.is_some()
        || wanted(filter, host_folder::HERE);
    // Prepared first: the library's tests hold its ABI against this kernel's headers.
    let prepared = if needs_lab {
        let _cache = ground.cache.lock()?;
        let prepared = prepare::prepare(ground)?;
        let headers = kernel::headers(&ground.cache, &ground.logs, &prepared.kernel_source)?;
        Some((prepared, headers))
    } else {
        None
    };
    let headers = prepared.as_ref().map(|(_, headers)| headers.as_path());
    match filter.is_some_and(mode::means_only_l1) {
        true => ui::note(
            "the workspace's own tests are neither built nor run: the filter names scenarios",
        ),
        false => tally.add_all(&cargo_tests::run(
            &ground.logs,
            &ground.tree,
            filter,
            headers,
        )?),
    }
    if let Some((prepared, _)) = &prepared {
        if wanted(filter, host_folder::HERE) {
            tally.add(host_folder::HERE, &host_folder::here(ground, prepared)?);
        }
        skip_what_is_not_offered(&prepared.kernel, &mut scenarios, &mut native, &mut tally);
        let mut programs = Vec::new();
        if !native.is_empty() {
            add_native(ground, &native, full.is_some(), &mut programs, &mut tally)?;
        }
        if let Some(full) = &full {
            let _cache = ground.cache.lock()?;
            programs.extend(full.selftests(ground, prepared, &mut tally)?);
        }
        for program in programs.extract_if(.., |program| !prepared.kernel.offers(program.mode)) {
            tally.add(&program.name, &no_in_place());
        }
        run_in_l1(ground, prepared, scenarios, &programs, patience, &mut tally)?;
        if let Some(full) = &full {
            full.run(ground, prepared, &mut tally)?;
        }
    }
    if !tally.failures().is_empty() {
        ui::line("\nfailed:");
        for name in tally.failures() {
            ui::line(&format!("    {name}"));
        }
    }
    ui::line(&tally.line());
    Ok(tally.good())
}

/// Takes out and counts what the lab's kernel has nothing for.
fn skip_what_is_not_offered(
    kernel: &Kernel,
    scenarios: &mut Vec<Run>,
    native: &mut Vec<Native>,
    tally: &mut Tally,
) {
    for run in scenarios.extract_if(.., |run| !kernel.offers(run.mode)) {
        tally.add(&scenario_name(&run.name()), &no_in_place());
    }
    for native in native.extract_if(.., |native| !kernel.offers(native.mode)) {
        tally.add(&native.name(), &no_in_place());
    }
}

fn no_in_place() -> Verdict {
    Verdict::Skipped(demo::NO_IN_PLACE.into())
}

fn add_native(
    ground: &Ground,
    native: &[Native],
    full: bool,
    programs: &mut Vec<Program>,
    tally: &mut Tally,
) -> Result<()> {
    let _cache = ground.cache.lock()?;
    match in_l1::native(&ground.cache, &ground.logs, &ground.tree, native, full) {
        Ok(built) => programs.extend(built),
        Err(error) => {
            interrupt::check()?;
            let verdict = Verdict::Failed(format!("{error:#}"));
            for native in native {
                tally.add(&native.name(), &verdict);
            }
        }
    }
    Ok(())
}

/// Scenarios and programs in as few boots of L1 as possible.
fn run_in_l1(
    ground: &Ground,
    prepared: &Prepared,
    mut scenarios: Vec<Run>,
    programs: &[Program],
    patience: f64,
    tally: &mut Tally,
) -> Result<()> {
    let (unpatched, patched): (Vec<Program>, Vec<Program>) = programs
        .iter()
        .cloned()
        .partition(|program| program.mode == Mode::Unpatched);
    for mode in Mode::ALL {
        if programs.iter().any(|program| program.mode == mode) {
            scenarios.push(Run::new(PROGRAMS, mode));
        }
    }
    if scenarios.is_empty() {
        return Ok(());
    }
    let packed = {
        let _cache = ground.cache.lock()?;
        let has = |unpatched| {
            let mut modes = scenarios.iter().map(|run| run.mode);
            modes.any(|mode| (mode == Mode::Unpatched) == unpatched)
        };
        let pack = |unpatched, programs: &[Program]| {
            let as_a_host = scenarios.iter().any(|run| {
                run.scenario == mode::AS_A_HOST && (run.mode == Mode::Unpatched) == unpatched
            });
            let mut extra = (!programs.is_empty() || as_a_host).then(|| in_l1::extra(programs));
            if let (Some(extra), true) = (&mut extra, as_a_host) {
                extra.folder = Some(host_folder::for_l1(ground, prepared)?);
            }
            match (has(unpatched), unpatched, extra) {
                (false, ..) | (_, false, None) => Ok(None),
                (_, true, extra) => {
                    prepare::with_unpatched_kernel(ground, prepared, extra.as_ref()).map(Some)
                }
                (_, false, Some(extra)) => prepare::with_extra(ground, prepared, &extra).map(Some),
            }
        };
        (pack(false, &patched)?, pack(true, &unpatched)?)
    };
    let images = packed.0.as_ref().unwrap_or(&prepared.images);
    let session = Session {
        unpatched: packed.1.as_ref(),
        ..demo::session(ground, prepared, images, patience)
    };
    let mut outcomes = session.run(&scenarios, |run, outcome| {
        if run.scenario == PROGRAMS {
            tally.add_all(&in_l1::verdicts(programs, run.mode, outcome));
        } else {
            tally.add(&scenario_name(&outcome.name), &verdict(outcome));
        }
    })?;
    if let Some(verdict) = one_binary::verdict(&outcomes) {
        tally.add(one_binary::NAME, &verdict);
    }
    outcomes.retain(|outcome| !outcome.name.ends_with(PROGRAMS));
    report::write(&outcomes, &ground.tree.results().join("report.json"))
}

/// How a scenario counts.
pub fn verdict(outcome: &Outcome) -> Verdict {
    if outcome.ok {
        Verdict::Passed
    } else {
        Verdict::Failed(outcome.line())
    }
}

fn scenario_name(name: &str) -> String {
    format!("scenario {name}")
}
