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

/// What a VM has to say, by what must not be held back for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// A request of the guest that got an error: the guest has it, too.
    Request,
    /// What a conversion could not do as it should, and others can make up for.
    Trouble,
    /// Pages that devices don't reach any more, or still do.
    Quarantine,
    /// Memory that the host's hardware has lost.
    Poison,
}

/// What a guest can make us say of one VM: each class by itself, so that no repetition of one holds another
/// back.
#[derive(Debug)]
pub(crate) struct Voices {
    request: Throttle,
    trouble: Throttle,
    quarantine: Throttle,
    poison: Throttle,
}

impl Default for Voices {
    fn default() -> Self {
        // Enough in a second for the whole story of what goes wrong in one conversion.
        const STORY: u32 = 20;
        Self {
            request: Throttle::new(1),
            trouble: Throttle::new(STORY),
            quarantine: Throttle::new(STORY),
            poison: Throttle::new(STORY),
        }
    }
}

impl Voices {
    /// What to append to a message of a class, if it may pass: a note of those that did not.
    pub(crate) fn pass(&self, class: Class) -> Option<String> {
        let throttle = match class {
            Class::Request => &self.request,
            Class::Trouble => &self.trouble,
            Class::Quarantine => &self.quarantine,
            Class::Poison => &self.poison,
        };
        throttle.pass().map(note_of)
    }

    /// Logs an error of a module, if it may pass.
    pub(crate) fn say(&self, module: &'static str, class: Class, what: impl FnOnce() -> String) {
        if let Some(note) = self.pass(class) {
            log::error!(target: module, "{}{note}", what());
        }
    }
}

/// Messages that each place in the code gets through in a second, if a guest can lead there: of what is no
/// one VM's, or no error.
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
    fn no_class_is_held_back_for_another() {
        let voices = Voices::default();
        for class in [Class::Request, Class::Trouble, Class::Quarantine] {
            while voices.pass(class).is_some() {}
        }
        assert_eq!(voices.pass(Class::Poison).as_deref(), Some(""));
        assert_eq!(voices.pass(Class::Quarantine), None);
    }

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
