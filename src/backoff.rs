// SPDX-License-Identifier: MIT OR Apache-2.0
//! Waiting for what passes by itself, but not for ever.

use crate::sync::thread;
use std::time::Duration;

/// A guest waits meanwhile, so the first wait is about as long as what most often passes takes: a host
/// thread that reads a page, a page that moves.
const FIRST: Duration = Duration::from_micros(50);

/// And the last one ends before a guest takes its vCPU for stuck. A closed io_uring ring, the slowest
/// cause that is known to pass by itself, holds pages for 15 to 23 ms.
const TOTAL: Duration = Duration::from_millis(100);

/// Waits that grow.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
    left: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            next: FIRST,
            left: TOTAL,
        }
    }
}

impl Backoff {
    /// Sleeps, longer each time; false, at once, when there has been enough of it.
    pub(crate) fn wait(&mut self) -> bool {
        let Some(pause) = self.pause() else {
            return false;
        };
        thread::sleep(pause);
        true
    }

    fn pause(&mut self) -> Option<Duration> {
        let pause = self.next.min(self.left);
        self.left -= pause;
        self.next *= 2;
        (!pause.is_zero()).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_are_a_tenth_of_a_second_together() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Duration> = std::iter::from_fn(|| backoff.pause()).collect();
        assert_eq!(pauses.iter().sum::<Duration>(), TOTAL);
        let all_but_last = &pauses[..pauses.len() - 1];
        assert!(all_but_last.windows(2).all(|two| two[1] == two[0] * 2));
        assert!(pauses.len() < 20, "{pauses:?}");
    }
}
