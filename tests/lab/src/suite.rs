// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo lab test`: the workspace's tests, then the scenarios; with `--full` also what shows that lab and series are sound.

use crate::prepare::{self, Ground, Prepared};
use crate::report::Outcome;
use crate::session::SCENARIOS;
use crate::tally::{wanted, Tally, Verdict};
use crate::{cargo_tests, demo, full, report, ui};
use anyhow::{Context, Result};

/// Runs what the filter lets through; says whether nothing failed.
pub fn run(ground: &Ground, filter: Option<&str>, full: bool, patience: f64) -> Result<bool> {
    let results = ground.tree.results();
    std::fs::create_dir_all(&results)
        .with_context(|| format!("can't create {}", results.display()))?;
    let _results = demo::results_lock(ground)?;
    let mut tally = Tally::default();
    tally.add_all(&cargo_tests::run(&ground.logs, &ground.tree, filter)?);

    let scenarios: Vec<(&str, u64)> = SCENARIOS
        .iter()
        .copied()
        .filter(|(name, _)| wanted(filter, &scenario_name(name)))
        .collect();
    let full = full
        .then(|| full::Selection::new(ground, filter))
        .transpose()?;
    // QEMU's tests have names that only a build knows, so any filter may mean some of them.
    if !scenarios.is_empty() || full.is_some() {
        let prepared = {
            let _cache = ground.cache.lock()?;
            prepare::prepare(ground)?
        };
        run_scenarios(ground, &prepared, &scenarios, patience, &mut tally)?;
        if let Some(full) = &full {
            full.run(ground, &prepared, patience, &mut tally)?;
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

fn run_scenarios(
    ground: &Ground,
    prepared: &Prepared,
    scenarios: &[(&str, u64)],
    patience: f64,
    tally: &mut Tally,
) -> Result<()> {
    if scenarios.is_empty() {
        return Ok(());
    }
    let outcomes =
        demo::session(ground, prepared, &prepared.images, patience).run(scenarios, |outcome| {
            tally.add(&scenario_name(&outcome.name), &verdict(outcome));
        })?;
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
