// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest can cause the same messages without end; the log gets a few of them a second.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);

/// Lets a message through, or counts it.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// So many a second.
    most: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    second: Option<Instant>,
    passed: u32,
    suppressed: u64,
}

impl Throttle {
    /// `most` messages pass in a second.
    pub(crate) const fn new(most: u32) -> Self {
        Self {
            most,
            state: Mutex::new(State {
                second: None,
                passed: 0,
                suppressed: 0,
            }),
        }
    }

    /// How many messages were held back since the last one, if this one may pass.
    pub(crate) fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.second.is_none_or(|begin| now >= begin + INTERVAL) {
            state.second = Some(now);
            state.passed = 0;
        }
        if state.passed == self.most {
            state.suppressed += 1;
            return None;
        }
        state.passed += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

/// What to append to a message that passed.
pub(crate) fn note_of(suppressed: u64) -> String {
    match suppressed {
        0 => String::new(),
        more => format!(" ({more} more such messages were held back)"),
    }
}

/// Messages that each place in the code gets through in a second, if a guest can lead there.
pub(crate) const PER_PLACE: u32 = 5;

/// As `error!`, `warn!` and `info!`, which are named first, for what a guest can cause again and again.
macro_rules! limited {
    ($level:ident, $($text:tt)+) => {{
        static THROTTLE: $crate::throttle::Throttle =
            $crate::throttle::Throttle::new($crate::throttle::PER_PLACE);
        if let Some(suppressed) = THROTTLE.pass() {
            let note = $crate::throttle::note_of(suppressed);
            log::$level!("{}{note}", format_args!($($text)+));
        }
    }};
}
pub(crate) use limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_messages_a_second_pass_and_say_how_many_did_not() {
        let throttle = Throttle::new(2);
        let start = Instant::now();
        assert_eq!(throttle.pass_at(start), Some(0));
        assert_eq!(throttle.pass_at(start), Some(0));
        assert_eq!(throttle.pass_at(start + INTERVAL / 2), None);
        assert_eq!(throttle.pass_at(start + INTERVAL / 2), None);
        assert_eq!(throttle.pass_at(start + INTERVAL), Some(2));
        assert_eq!(throttle.pass_at(start + INTERVAL * 2), Some(0));
    }
}
