// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest asks for that can't be healed, and how often that is tried.

use super::window_set::WindowSet;
use crate::attributes::Attribute;
use crate::error::{Error, Result};
use crate::sync::{Mutex, MutexGuard, PoisonError};
use crate::throttle::Throttle;
use crate::units::{Offset, Span};

/// How often a second it is tried after it has failed: each time costs maps that fail, and a guest asks as
/// often as it likes.
const TRIES: u32 = 20;

/// What is looked at, at once, of a range that a guest chooses.
const PIECE_BYTES: u64 = 64 << 20;

/// The last attempt of a guest's in a block.
#[derive(Debug)]
pub(super) struct Unhealed {
    /// Why it failed, if it did.
    error: Mutex<Option<Error>>,
    tries: Throttle,
}

impl Default for Unhealed {
    fn default() -> Self {
        Self {
            error: Mutex::default(),
            tries: Throttle::new(TRIES),
        }
    }
}

impl Unhealed {
    fn error(&self) -> MutexGuard<'_, Option<Error>> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WindowSet {
    /// As [`WindowSet::heal`], for a guest that asks for what it has. Once that has failed it is tried a few times a
    /// second, and between fails as it did, without a call. The caller holds the hull.
    pub(crate) fn heal_for_guest(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        if !self.core().quarantine.touches(span) || !self.lacks_something(span, attribute) {
            return Ok(());
        }
        if let Some(error) = &*self.unhealed.error() {
            if self.unhealed.tries.pass().is_none() {
                return Err(error.clone());
            }
        }
        let mut result = Ok(());
        for piece in span.pieces(PIECE_BYTES) {
            result = result.and(self.heal(piece, attribute));
        }
        *self.unhealed.error() = result.as_ref().err().cloned();
        result
    }

    /// Whether a page of `span` that has the attribute is quarantined.
    fn lacks_something(&self, span: Span<Offset>, attribute: Attribute) -> bool {
        span.pieces(PIECE_BYTES).any(|piece| {
            let quarantined = self.core().quarantine.inside(piece);
            let attributes = self.core().pages.attributes();
            let has = |&part: &Span<Offset>| attributes.any_change(part, attribute.other());
            quarantined.iter().any(has)
        })
    }
}
