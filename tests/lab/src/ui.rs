// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the user sees: one moving line per step on a terminal, plain lines elsewhere.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// In a log, one line per step in this time is enough.
const PLAIN_INTERVAL: Duration = Duration::from_secs(60);

static BARS: OnceLock<Option<MultiProgress>> = OnceLock::new();

fn bars() -> Option<&'static MultiProgress> {
    BARS.get_or_init(|| {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        (std::io::stderr().is_terminal() && !dumb).then(MultiProgress::new)
    })
    .as_ref()
}

/// A line that stays: to stdout, above the moving ones.
pub fn line(text: &str) {
    let print = || {
        let mut out = std::io::stdout().lock();
        // A reader that went away must not turn into a panic half-way through a build.
        let _ = writeln!(out, "{text}").and_then(|()| out.flush());
    };
    match bars() {
        Some(bars) => bars.suspend(print),
        None => print(),
    }
}

/// A line that stays: about the run, so to stderr.
pub fn note(text: &str) {
    let print = || {
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    };
    match bars() {
        Some(bars) => bars.suspend(print),
        None => print(),
    }
}

/// One thing that takes time. Dropped without `done`, it just disappears: the error tells the rest.
pub struct Step {
    name: String,
    start: Instant,
    bar: Option<ProgressBar>,
    last_plain: Mutex<Instant>,
}

/// Starts showing a step.
pub fn step(name: &str, text: &str) -> Step {
    let bar = bars().map(|bars| {
        let bar = bars.add(ProgressBar::new_spinner());
        bar.set_style(
            ProgressStyle::with_template("{spinner} {prefix:<14} {wide_msg} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner()),
        );
        bar.set_prefix(name.to_string());
        bar.set_message(text.to_string());
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    });
    if bar.is_none() {
        note(&format!("{name:<14} {text}"));
    }
    Step {
        name: name.to_string(),
        start: Instant::now(),
        bar,
        last_plain: Mutex::new(Instant::now()),
    }
}

impl Step {
    /// What it does now; cheap enough to be called for every line of a build.
    pub fn update(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_string());
            return;
        }
        let mut last = self.last_plain.lock().unwrap_or_else(|e| e.into_inner());
        if last.elapsed() >= PLAIN_INTERVAL {
            *last = Instant::now();
            note(&format!("{:<14} {text}", self.name));
        }
    }

    /// A turn worth a line of its own, even in a log.
    pub fn turn(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_string()),
            None => note(&format!("{:<14} {text}", self.name)),
        }
    }

    pub fn done(self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        note(&format!(
            "{:<14} {text} ({})",
            self.name,
            duration(self.start.elapsed())
        ));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `4.2 s`, `3 min 07 s`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 60 {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(duration(Duration::from_millis(4230)), "4.2 s");
        assert_eq!(duration(Duration::from_secs(187)), "3 min 07 s");
    }
}
