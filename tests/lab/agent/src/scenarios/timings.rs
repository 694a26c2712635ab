// SPDX-License-Identifier: MIT OR Apache-2.0
//! The same guest on memory-backend-memfd and on memory-backend-gmem, turn and turn about: how many times as long things take.
//!
//! Only ratios are told: a time of somebody's machine says nothing about ours.

use crate::boot::CommandLine;
use crate::failure::Failure;
use crate::scenario::{Outcome, Scenario};
use crate::small_guest::SmallGuest;
use serde_json::{json, Map, Value};
use std::time::{Duration, Instant};

const ROUNDS: usize = 5;

/// What is timed, in the order of `once`.
const STEPS: [&str; 5] = [
    "start of QEMU to the guest's first word",
    "first touch of 64 MiB",
    "writing to 64 MiB again",
    "reading 64 MiB",
    "end of QEMU",
];

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let mut pairs: Vec<[Vec<f64>; 2]> = STEPS.iter().map(|_| Default::default()).collect();
    for round in 0..ROUNDS {
        // Each is first as often as the other, but for one round: caches and clocks favour neither.
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for side in order {
            let kind = ["memory-backend-memfd,share=on", "memory-backend-gmem"][side];
            let times = once(scenario, kind, &format!("{round}-{side}"))?;
            for (pair, time) in pairs.iter_mut().zip(times) {
                pair[side].push(time.as_secs_f64());
            }
        }
        scenario.progress(format!("round {} of {ROUNDS}", round + 1));
    }
    let ratios: Map<String, Value> = STEPS
        .iter()
        .zip(&pairs)
        .map(|(step, [memfd, gmem])| (step.to_string(), ratio(memfd, gmem)))
        .collect();
    scenario.fact("rounds", ROUNDS);
    scenario.fact("ratios", ratios);
    Ok(())
}

fn once(scenario: &Scenario, kind: &str, name: &str) -> Result<[Duration; 5], Failure> {
    let mut last = Instant::now();
    let mut lap = || std::mem::replace(&mut last, Instant::now()).elapsed();
    let mut guest = SmallGuest::start(
        &scenario.directory().join(name),
        kind,
        &["-machine", "q35,accel=kvm,smm=off,memory-backend=ram0"],
    )?;
    let start = lap();
    guest.write()?;
    let touch = lap();
    guest.write()?;
    let write = lap();
    guest.read()?;
    let read = lap();
    guest.end()?;
    Ok([start, touch, write, read, lap()])
}

/// Of medians, and of the rounds.
pub fn ratio(memfd: &[f64], gmem: &[f64]) -> Value {
    let rounds: Vec<f64> = gmem
        .iter()
        .zip(memfd)
        .map(|(gmem, memfd)| gmem / memfd)
        .collect();
    let rounded = |ratio: f64| (ratio * 100.0).round() / 100.0;
    json!({
        "median": rounded(median(gmem) / median(memfd)),
        "lowest": rounded(rounds.iter().copied().fold(f64::INFINITY, f64::min)),
        "highest": rounded(rounds.iter().copied().fold(0.0, f64::max)),
    })
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::ratio;
    use serde_json::json;

    #[test]
    fn a_ratio_is_of_medians_and_the_rounds_bound_it() {
        let found = ratio(&[1.0, 2.0, 4.0], &[1.0, 1.0, 8.0]);
        assert_eq!(found, json!({"median": 0.5, "lowest": 0.5, "highest": 2.0}));
    }
}
