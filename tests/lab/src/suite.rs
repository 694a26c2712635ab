// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo lab test`: the workspace's tests, then the scenarios; with `--full` also what shows that lab and series are sound.

use crate::full::Selection;
use crate::in_l1::{self, Program};
use crate::prepare::{self, Ground, Prepared};
use crate::report::Outcome;
use crate::session::{AFTER, BEFORE, PROGRAMS, SCENARIOS};
use crate::tally::{wanted, Tally, Verdict};
use crate::{cargo_tests, demo, host, interrupt, kernel, report, ui};
use anyhow::{Context, Result};

/// Runs what the filter lets through; says whether nothing failed.
pub fn run(ground: &Ground, filter: Option<&str>, full: bool, patience: f64) -> Result<bool> {
    let results = ground.tree.results();
    std::fs::create_dir_all(&results)
        .with_context(|| format!("can't create {}", results.display()))?;
    let _results = demo::results_lock(ground)?;
    host::prepare(&ground.logs)?;

    let mut tally = Tally::default();
    let scenarios: Vec<(&str, u64)> = [BEFORE, SCENARIOS, AFTER]
        .concat()
        .into_iter()
        .filter(|(name, _)| wanted(filter, &scenario_name(name)))
        .collect();
    let full = full.then(|| Selection::new(ground, filter)).transpose()?;
    let native = wanted(filter, &in_l1::native_name());
    // QEMU's tests have names that only a build knows, so with --full any filter may mean some of them.
    let needs_lab = !scenarios.is_empty() || native || full.is_some();
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
    tally.add_all(&cargo_tests::run(
        &ground.logs,
        &ground.tree,
        filter,
        headers,
    )?);
    if let Some((prepared, _)) = &prepared {
        let mut programs = Vec::new();
        if native {
            add_native(ground, &mut programs, &mut tally)?;
        }
        if let Some(full) = &full {
            let _cache = ground.cache.lock()?;
            programs.extend(full.selftests(ground, prepared, &mut tally)?);
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

fn add_native(ground: &Ground, programs: &mut Vec<Program>, tally: &mut Tally) -> Result<()> {
    let _cache = ground.cache.lock()?;
    match in_l1::native(&ground.cache, &ground.logs, &ground.tree) {
        Ok(program) => programs.push(program),
        Err(error) => {
            interrupt::check()?;
            tally.add(
                &in_l1::native_name(),
                &Verdict::Failed(format!("{error:#}")),
            );
        }
    }
    Ok(())
}

/// Scenarios and programs in as few boots of L1 as possible.
fn run_in_l1(
    ground: &Ground,
    prepared: &Prepared,
    mut scenarios: Vec<(&str, u64)>,
    programs: &[Program],
    patience: f64,
    tally: &mut Tally,
) -> Result<()> {
    let packed = if programs.is_empty() {
        None
    } else {
        scenarios.push(PROGRAMS);
        let _cache = ground.cache.lock()?;
        Some(prepare::with_extra(
            ground,
            prepared,
            &in_l1::extra(programs),
        )?)
    };
    if scenarios.is_empty() {
        return Ok(());
    }
    let images = packed.as_ref().unwrap_or(&prepared.images);
    let mut outcomes =
        demo::session(ground, prepared, images, patience).run(&scenarios, |outcome| {
            if outcome.name == PROGRAMS.0 {
                tally.add_all(&in_l1::verdicts(programs, outcome));
            } else {
                tally.add(&scenario_name(&outcome.name), &verdict(outcome));
            }
        })?;
    outcomes.retain(|outcome| outcome.name != PROGRAMS.0);
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
