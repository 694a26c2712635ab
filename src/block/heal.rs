// SPDX-License-Identifier: MIT OR Apache-2.0
//! When what is quarantined is tried again: whenever somebody asks for it, changes windows there, or resets
//! the block, and from time to time by itself. So are windows that could not be closed and nobody has.

use super::window_set::WindowSet;
use crate::dma::PIECE;
use crate::sync::{Arc, Instant, Mutex, PoisonError};
use crate::throttle::limited;
use crate::units::{Offset, Span};
use crate::upkeep::Chore;
use std::time::Duration;

/// When what was quarantined is tried again for the first time, and how long it waits at most from one time
/// to the next: each is twice as long as the one before.
const FIRST: Duration = Duration::from_secs(1);
const LAST: Duration = Duration::from_secs(60);

/// Who converts a page next to what is put right waits for one piece of it.
const SMALL_PIECE: u64 = 64 << 20;

/// What somebody has for longer is left for the next time: memory of other blocks is to be released meanwhile.
const PATIENCE: Duration = Duration::from_millis(10);

/// Heals a block from time to time, until the block takes it out of the VM's [upkeep](crate::upkeep).
#[derive(Debug)]
pub(super) struct Healer {
    windows: Arc<WindowSet>,
    next: Mutex<Option<Next>>,
}

#[derive(Clone, Copy, Debug)]
struct Next {
    at: Instant,
    pause: Duration,
}

impl Healer {
    pub(super) fn of(windows: &Arc<WindowSet>) -> Arc<Self> {
        Arc::new(Self {
            windows: windows.clone(),
            next: Mutex::new(None),
        })
    }
}

impl Chore for Healer {
    fn tend(&self, now: Instant) -> Option<Instant> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let core = self.windows.core();
        if core.quarantine.is_empty() && !self.windows.has_abandoned() {
            *next = None;
            return None;
        }
        let after = match *next {
            None => Next {
                at: now + FIRST,
                pause: FIRST,
            },
            Some(next) if now < next.at => next,
            Some(Next { pause, .. }) => {
                // First: one may have what others are to have.
                if let Err(error) = self.windows.close_abandoned(Some(PATIENCE)) {
                    limited!(warn, "{error}");
                }
                self.windows.lock_and_heal(core.span, Some(PATIENCE));
                let pause = (pause * 2).min(LAST);
                Next {
                    at: Instant::now() + pause,
                    pause,
                }
            }
        };
        *next = Some(after);
        Some(after.at)
    }
}

impl WindowSet {
    /// Heals all of `span` that is quarantined, but for what others have locked for longer than its
    /// `patience`; in pieces: whoever converts elsewhere goes on.
    pub(crate) fn lock_and_heal(&self, span: Span<Offset>, patience: Option<Duration>) {
        let core = self.core();
        // An ordinary block's windows are mapped in pieces of this size.
        let unit = match core.confidential {
            true => SMALL_PIECE,
            false => PIECE,
        };
        let mut rest = Some(span);
        while let Some(run) = rest.and_then(|rest| core.quarantine.first_in(rest)) {
            let end = run.end().min((run.first() / unit + 1) * unit);
            let piece = Span::between(run.first(), end);
            let locked = match patience {
                None => Some(core.lock(piece)),
                Some(time) => core.lock_until(piece, Instant::now() + time),
            };
            if locked.is_some() {
                self.try_to_heal(piece);
            }
            rest = (end < span.end()).then(|| Span::between(end, span.end()));
        }
    }
}
