// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a change of a window takes along besides what it is asked for.
//!
//! Invariant: of a neighbour, nothing is ever mapped but what devices may reach at that moment; and what
//! of it they can't reach any more, or nobody knows, is told to whoever made the change.

use crate::run_set::Spans;
use crate::units::{Offset, Span};

/// Pages that a change of others may take along: those in one area with them.
pub(crate) struct Neighbours<'a> {
    /// The parts of a range that devices may reach. Nothing else is ever mapped that was not asked for.
    admissible: &'a dyn Fn(Span<Offset>) -> Spans<Offset>,
    taken: Taken,
}

/// What became of neighbours.
#[derive(Debug, Default)]
#[must_use = "of what was lost no device can be sure, and what has left may be over"]
pub(crate) struct Taken {
    /// Those that devices can't reach any more although they may, or nobody knows whether they can.
    pub(crate) lost: Vec<Span<Offset>>,
    /// Those that devices were not to have, and that have left for good.
    pub(crate) left: Vec<Span<Offset>>,
}

impl<'a> Neighbours<'a> {
    /// Has windows change, and answers besides what that took along.
    pub(crate) fn during<T>(
        admissible: &'a dyn Fn(Span<Offset>) -> Spans<Offset>,
        change: impl FnOnce(&mut Self) -> T,
    ) -> (T, Taken) {
        let mut neighbours = Self {
            admissible,
            taken: Taken::default(),
        };
        let changed = change(&mut neighbours);
        (changed, neighbours.taken)
    }

    pub(super) fn admissible(&self, span: Span<Offset>) -> Spans<Offset> {
        (self.admissible)(span)
    }

    pub(super) fn has_lost(&mut self, span: Span<Offset>) {
        self.taken.lost.push(span);
    }

    /// Nobody reaches anything there any more.
    pub(super) fn has_lost_nothing(&mut self) {
        self.taken.lost.clear();
    }

    pub(super) fn has_left(&mut self, span: Span<Offset>) {
        self.taken.left.push(span);
    }
}
