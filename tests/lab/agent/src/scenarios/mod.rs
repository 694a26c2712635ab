// SPDX-License-Identifier: MIT OR Apache-2.0
//! One file per scenario, one line per scenario here.

use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::scenario::{Outcome, Scenario};

/// A scenario: it records facts and ends at the first check that does not hold.
pub type Body = fn(&mut Scenario, &CommandLine) -> Outcome;

const SCENARIOS: &[(&str, Body)] = &[];

/// The body of the scenario called `name`.
pub fn find(name: &str) -> Result<Body, Failure> {
    SCENARIOS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, body)| *body)
        .attempt(|| {
            let known: Vec<_> = SCENARIOS.iter().map(|(name, _)| *name).collect();
            format!(
                "there is no scenario {name}; there are: {}",
                known.join(", ")
            )
        })
}
