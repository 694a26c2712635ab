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
    pub(super) admissible: &'a dyn Fn(Span<Offset>) -> Spans<Offset>,
    /// Those that devices can't reach any more although they may, or nobody knows whether they can.
    pub(crate) lost: Vec<Span<Offset>>,
    /// Those that devices were not to have, and that have left for good.
    pub(crate) left: Vec<Span<Offset>>,
}

impl<'a> Neighbours<'a> {
    pub(crate) fn new(admissible: &'a dyn Fn(Span<Offset>) -> Spans<Offset>) -> Self {
        Self {
            admissible,
            lost: Vec::new(),
            left: Vec::new(),
        }
    }
    pub(super) fn has_lost(&mut self, span: Span<Offset>) {
        self.lost.push(span);
    }

    /// Nobody reaches anything there any more.
    pub(super) fn has_lost_nothing(&mut self) {
        self.lost.clear();
    }

    pub(super) fn has_left(&mut self, span: Span<Offset>) {
        self.left.push(span);
    }
}
