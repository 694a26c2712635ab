// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo lab bench`: conversions measured against stock QEMU, and the library by itself.

mod cases;
mod measure;
mod native;
mod page;
mod planes;
mod plots;
mod summary;

use crate::machine::Shape;
use crate::mode::{Mode, Run};
use crate::prepare::{self, Ground};
use crate::report::Outcome;
use crate::session::Session;
use crate::{demo, host, patches, ui};
use anyhow::{bail, Context, Result};
use measure::Case;
use serde_json::Value;
use std::path::Path;
use std::time::Instant;
use summary::{Summary, LIBRARY};

#[derive(clap::Args)]
pub struct Options {
    /// Cases to measure (a part of a name is enough); all if none is named
    cases: Vec<String>,
    /// Keep the cases that bench.json has already and that are not measured now
    #[arg(long)]
    keep: bool,
    /// Measure nothing: judge and draw what bench.json has
    #[arg(long, conflicts_with = "keep")]
    redraw: bool,
    /// Also write the tables of docs/bench.md and the pictures beside it
    #[arg(long)]
    update_docs: bool,
}

/// Stock QEMU needs the guest's 8 GiB and as much again as tables and slab; five devices, so that none is used by two.
const LARGE: Shape = Shape {
    memory_mib: 12288,
    touched: true,
    nodes: 1,
    kernel_options: "",
    edus: 5,
    edu_properties: ",dma_delay=0",
};

/// For the kinds of memory, in both modes: a boot has either split memory or memory that converts in place.
const PLANES: Shape = Shape {
    memory_mib: 4096,
    edus: 2,
    ..LARGE
};

/// Measures; says whether every case could be, whatever its goals.
pub fn run(ground: &Ground, options: &Options, patience: f64) -> Result<bool> {
    let start = Instant::now();
    let wanted = choose(&options.cases)?;
    let results = ground.tree.results();
    std::fs::create_dir_all(&results)
        .with_context(|| format!("can't create {}", results.display()))?;
    let _results = demo::results_lock(ground)?;
    let path = results.join("bench.json");
    let mut summary = if options.keep || options.redraw {
        Summary::read(&path)?
    } else {
        Summary::default()
    };
    if !options.redraw {
        if !options.keep {
            // An earlier result must not be taken for one of this run.
            let _ = std::fs::remove_file(&path);
        }
        measure(ground, patience, &wanted, &mut summary, &path)?;
    }
    summary.write(&path)?;
    let growth = summary.growth.as_ref();
    plots::draw(&summary.cases(), growth, &results.join("bench"))?;
    if options.update_docs {
        let docs = ground.tree.root().join("docs");
        let pictures = plots::draw(&summary.cases(), growth, &docs.join("bench"))?;
        let stock = patches::series(&ground.tree.lab("bench"))?;
        let stock: Vec<_> = stock.into_iter().filter(|patch| is_stock(patch)).collect();
        page::update(&docs.join("bench.md"), &summary, &pictures, &stock)?;
    }
    ui::line("");
    ui::line(summary.table().trim_end());
    ui::line(summary.planes.text().trim_end());
    ui::line(&format!(
        "{} in {}; figures in target/lab/bench.json, pictures in target/lab/bench",
        if options.redraw { "drawn" } else { "measured" },
        ui::duration(start.elapsed())
    ));
    if !summary.rows.is_empty() {
        ui::line(&summary.line());
    }
    Ok(summary.complete())
}

/// The patch that changes stock's own path; the others serve both sides.
fn is_stock(patch: &Path) -> bool {
    patches::patch_stem(patch).starts_with("0001-")
}

/// The scenarios that measure what was asked for, and whether the library is to be measured too.
struct Wanted {
    scenarios: Vec<Run>,
    /// Those of the kinds of memory.
    planes: Vec<Run>,
    growth: bool,
}

fn choose(names: &[String]) -> Result<Wanted> {
    let known = || {
        let cases = cases::CASES.iter().map(|kind| kind.name);
        let planes = cases::PLANE_CASES.iter().map(|(name, _)| *name);
        cases.chain(planes).chain([LIBRARY])
    };
    for name in names {
        if !known().any(|case| case.contains(name.as_str())) {
            let all: Vec<&str> = known().collect();
            bail!("there is no case {name}; there are: {}", all.join(", "));
        }
    }
    let asked =
        |case: &str| names.is_empty() || names.iter().any(|name| case.contains(name.as_str()));
    let runs = |scenarios: &[(&'static str, u64, &[&str])], mode: Mode| -> Vec<Run> {
        scenarios
            .iter()
            .filter(|(_, _, cases)| cases.iter().any(|case| asked(case)))
            .map(|(scenario, limit, _)| Run {
                scenario,
                mode,
                seconds: *limit,
            })
            .collect()
    };
    let mut planes = runs(cases::PLANE_SCENARIOS, Mode::Split);
    planes.extend(runs(cases::PLANE_SCENARIOS, Mode::InPlace));
    Ok(Wanted {
        scenarios: runs(cases::SCENARIOS, Mode::Split),
        planes,
        growth: asked(LIBRARY),
    })
}

fn measure(
    ground: &Ground,
    patience: f64,
    wanted: &Wanted,
    summary: &mut Summary,
    path: &Path,
) -> Result<()> {
    if wanted.growth {
        summary.add_growth(native::measure(&ground.logs, &ground.tree)?);
    }
    if wanted.scenarios.is_empty() && wanted.planes.is_empty() {
        return Ok(());
    }
    let largest = match wanted.scenarios.is_empty() {
        true => PLANES,
        false => LARGE,
    };
    crate::machine::require_memory(&largest)?;
    let (prepared, qemu, images) = {
        let _cache = ground.cache.lock()?;
        let prepared = prepare::prepare(ground)?;
        let (qemu, images) = prepare::for_benchmark(ground, &prepared)?;
        (prepared, qemu, images)
    };
    summary.run = format!(
        "Linux {} in L1 of {} MiB (kinds of memory: {} MiB), QEMU {} with the series, emulated on {} processors.",
        prepared.kernel_source.version,
        LARGE.memory_mib,
        PLANES.memory_mib,
        prepared.qemu_source.version,
        host::jobs(),
    );
    let session = |shape, results| Session {
        qemu: &qemu.binary,
        firmware: &prepared.firmware.share,
        images: &images,
        unpatched: None,
        results,
        patience,
        shape,
        words: &ground.choices.kernel_option,
    };
    // At once: what was measured stays when the run is interrupted.
    let mut result = Ok(());
    let mut keep = |taken: Result<()>, summary: &Summary| {
        let kept = taken.and_then(|()| summary.write(path));
        if result.is_ok() {
            result = kept;
        }
    };
    if !wanted.scenarios.is_empty() {
        session(LARGE, ground.tree.results()).run(&wanted.scenarios, |_, outcome| {
            ui::line(&line(outcome));
            let taken = take(outcome, summary);
            keep(taken, summary);
        })?;
    }
    let (can, cannot): (Vec<Run>, Vec<Run>) = wanted
        .planes
        .iter()
        .cloned()
        .partition(|run| prepared.kernel.offers(run.mode));
    for run in &cannot {
        let why = "the kernel came without conversion in place";
        summary.planes.skip(run, why);
    }
    if !can.is_empty() {
        // Its consoles beside those of the others.
        let results = ground.tree.results().join("bench-inplace");
        session(PLANES, results).run(&can, |run, outcome| {
            ui::line(&line(outcome));
            let taken = summary.planes.take(run, outcome);
            keep(taken, summary);
        })?;
    }
    result
}

/// Enters what a scenario measured; what it did not is entered as that.
fn take(outcome: &Outcome, summary: &mut Summary) -> Result<()> {
    let told = outcome.facts.get("cases").and_then(Value::as_array);
    let mut measured = Vec::new();
    for told in told.into_iter().flatten() {
        let case = Case::new(told)?;
        measured.push(case.name.clone());
        summary.add(case);
    }
    let scenario = cases::SCENARIOS
        .iter()
        .find(|(scenario, ..)| *scenario == outcome.name);
    for case in scenario.map_or(&[][..], |(_, _, cases)| cases) {
        if !measured.iter().any(|name| name == case) {
            let error = outcome.error.as_deref();
            summary.add_failure(case, error.unwrap_or("the scenario reported no such case"));
        }
    }
    Ok(())
}

/// `bench-share-1g  ok  61.2 s  share-1g: 9.1 s, ours 2.2 s …`
fn line(outcome: &Outcome) -> String {
    let mut brief = outcome.clone();
    // Each is in tables at the end.
    for table in ["cases", "readings", "calls", "yardsticks", "missing"] {
        brief.facts.remove(table);
    }
    let mut text = brief.line();
    let told = outcome.facts.get("cases").and_then(Value::as_array);
    for case in told
        .into_iter()
        .flatten()
        .filter_map(|told| Case::new(told).ok())
    {
        text.push_str(&format!("\n    {:<17}", case.name));
        for side in ["stock", "gmem", "bare"] {
            if let Some(seconds) = case.figure(side, "seconds") {
                text.push_str(&format!("  {side} {}", plots::microseconds(seconds * 1e6)));
            }
        }
        if let Some(ratio) = case.ratio("seconds") {
            text.push_str(&format!("  ratio {}", plots::short(ratio)));
        }
        if let Some(ratio) = case.bare_ratio("seconds") {
            text.push_str(&format!("  by bare {}", plots::short(ratio)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn outcome(facts: Value, error: Option<&str>) -> Outcome {
        Outcome {
            name: "bench-share-1g".into(),
            ok: error.is_none(),
            seconds: 1.0,
            facts: facts.as_object().unwrap().clone(),
            error: error.map(str::to_string),
            console: None,
        }
    }

    #[test]
    fn a_part_of_a_name_chooses_and_a_wrong_one_is_refused() {
        let names = |list: &[&str]| list.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let all = choose(&[]).unwrap();
        assert_eq!(all.scenarios.len(), cases::SCENARIOS.len());
        assert!(all.growth);
        assert_eq!(all.planes.len(), 2 * cases::PLANE_SCENARIOS.len());
        let some = choose(&names(&["share-1g-unit", "boot"])).unwrap();
        let chosen: Vec<&str> = some.scenarios.iter().map(|run| run.scenario).collect();
        assert_eq!(
            chosen,
            ["bench-share-1g", "bench-tdx-boot", "bench-snp-boot"]
        );
        assert!(!some.growth && some.planes.is_empty());
        let planes = choose(&names(&["inplace-2m"])).unwrap();
        let chosen: Vec<String> = planes.planes.iter().map(Run::name).collect();
        assert_eq!(
            chosen,
            ["bench-inplace-convert", "in-place/bench-inplace-convert"]
        );
        assert!(planes.scenarios.is_empty());
        let growth = choose(&names(&["growth"])).unwrap();
        assert!(growth.growth && growth.scenarios.is_empty());
        assert!(choose(&names(&["nonsense"])).is_err());
    }

    #[test]
    fn a_case_that_was_not_reported_is_a_failure_with_the_scenarios_reason() {
        let mut summary = Summary::default();
        let facts = json!({"cases": [{"name": "share-1g", "gmem": {"runs": [1.0]}}]});
        take(&outcome(facts, Some("L1 went down")), &mut summary).unwrap();
        let rows: Vec<(&str, Option<&str>)> = summary
            .rows
            .iter()
            .map(|row| (row.name.as_str(), row.error.as_deref()))
            .collect();
        assert_eq!(
            rows,
            [("share-1g", None), ("share-1g-unit", Some("L1 went down"))]
        );
    }

    #[test]
    fn a_scenarios_line_has_the_times_of_its_cases() {
        let facts = json!({"cases": [
            {"name": "share-1g", "stock": {"runs": [9.0]}, "gmem": {"runs": [3.0]}, "bare": {"seconds": 2.5}},
        ]});
        let text = line(&outcome(facts, None));
        assert!(
            text.contains("stock 9 s  gmem 3 s  bare 2.50 s  ratio 3  by bare 1.20"),
            "{text}"
        );
    }
}
