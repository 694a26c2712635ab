// SPDX-License-Identifier: MIT OR Apache-2.0
//! Finding out what a call that failed has done.
//!
//! Invariant: what may be mapped counts as mapped, and is doubtful until the kernel has been asked about it and
//! has answered. Taking it for unmapped is how a device gets to write private pages.

use super::Window;
use crate::dma::strategy::{How, Removal, StrategyKind};
use crate::dma::Neighbours;
use crate::error::{Doing, Result};
use crate::run_set::{RunSet, Spans};
use crate::throttle::limited;
use crate::units::{Iova, Span, PAGE_SIZE};

impl Window {
    /// Finds out what an unmap that failed has done. A cut may have removed areas that lie in its
    /// range, and nothing beyond.
    pub(super) fn settle_after_failure(
        &self,
        removal: &Removal,
        asked: Span<Iova>,
        neighbours: &mut Neighbours,
    ) {
        let pieces = {
            let mut state = self.state();
            if let How::Cut { .. } = removal.how {
                state.ledger.note_failed_cut(removal.span);
            }
            state.ledger.pieces(removal.span)
        };
        if let Err(error) = self.settle(pieces, asked, neighbours) {
            limited!(error, "after an unmap that failed: {error}");
        }
    }

    /// Finds out about what is doubtful of the areas that `asked` has a page of: of all of each where the
    /// caller holds it, since it goes and comes as a whole, and where it can be cut of what he asks for.
    pub(super) fn settle_doubtful(
        &self,
        asked: Span<Iova>,
        neighbours: &mut Neighbours,
    ) -> Result<()> {
        let doubtful: Spans<Iova> = {
            let ledger = &self.state().ledger;
            if ledger.is_certain() {
                return Ok(());
            }
            match self.kind {
                StrategyKind::Cut => ledger.doubtful(asked),
                _ => {
                    let areas = ledger.runs(asked).into_iter();
                    areas.flat_map(|area| ledger.doubtful(area)).collect()
                }
            }
        };
        self.settle(doubtful, asked, neighbours)
    }

    /// Finds out about pieces of areas after an unmap that failed, which may have removed some at the
    /// front of its range: the kernel is [asked](super::super::context::Context::is_mapped) about the first page
    /// of each. ENOENT from another unmap would prove nothing, and to map one and see whether something is in the
    /// way takes memory that may not be there, or may not be shown. What can't be told now is asked again before
    /// the range next changes.
    ///
    /// What was gone comes back as far as devices may reach it; the rest has left.
    fn settle(
        &self,
        pieces: Spans<Iova>,
        asked: Span<Iova>,
        neighbours: &mut Neighbours,
    ) -> Result<()> {
        let mut result = Ok(());
        for piece in pieces {
            let first = Span::between(piece.first(), piece.first() + PAGE_SIZE);
            match self.context.is_mapped(self.ioas(), first) {
                Ok(true) => self.state().ledger.set_doubtful(piece, false),
                Ok(false) => {
                    self.strike_out(piece);
                    for part in self.part_ways(piece, neighbours) {
                        self.refill(part, asked, neighbours);
                    }
                }
                Err(call) => {
                    self.state().ledger.set_doubtful(piece, true);
                    let parts = self.admissible(piece, neighbours);
                    self.lose(&parts, asked, neighbours);
                    result = result.and(Err(call));
                }
            }
        }
        result.doing(|| format!("finding out what IOAS {} still maps", self.ioas_id))
    }

    /// Undoes the maps in `gap`, which had none before.
    pub(super) fn unmap_again(&self, gap: Span<Iova>) {
        let runs = self.state().ledger.runs(gap);
        for run in runs {
            let Err(call) = self.unmap(run) else {
                self.strike_out(run);
                continue;
            };
            self.state().ledger.set_doubtful(run, true);
            limited!(
                error,
                "{run} may stay mapped in IOAS {} although it was to be undone: {call}",
                self.ioas_id
            );
        }
    }

    /// The parts of an area that devices may reach.
    pub(super) fn admissible(&self, area: Span<Iova>, neighbours: &Neighbours) -> Spans<Iova> {
        if self.state().closing {
            return Spans::new();
        }
        let parts = neighbours.admissible(self.offsets(area)).into_iter();
        parts.map(|part| self.iovas_at(part)).collect()
    }

    /// The parts of what is out that are to come back. The rest has left for good.
    pub(super) fn part_ways(&self, out: Span<Iova>, neighbours: &mut Neighbours) -> Spans<Iova> {
        let staying = self.admissible(out, neighbours);
        let mut leaving = RunSet::of(&[out]);
        staying.iter().for_each(|&run| leaving.remove(run));
        for part in leaving.inside(out) {
            neighbours.has_left(self.offsets(part));
        }
        staying
    }

    /// Maps a part that was out for a moment. What can't be mapped is lost, but for what is `asked` for,
    /// of which the caller hears.
    pub(super) fn refill(&self, part: Span<Iova>, asked: Span<Iova>, neighbours: &mut Neighbours) {
        let Err(error) = self.fill(part) else {
            return;
        };
        limited!(error, "devices lose {}: {error}", self.offsets(part));
        // Some page of what is asked for may have been in the way of others.
        let mut others = RunSet::of(&self.state().ledger.gaps(part));
        others.remove(asked);
        if part.overlaps(&asked) {
            for gap in others.inside(part) {
                let _ = self.fill(gap);
            }
        }
        let left = self.state().ledger.gaps(part);
        self.lose(&left, asked, neighbours);
    }

    /// Devices can't reach these parts, or nobody knows.
    fn lose(&self, parts: &[Span<Iova>], asked: Span<Iova>, neighbours: &mut Neighbours) {
        for &part in parts {
            let mut lost = RunSet::of(&[part]);
            lost.remove(asked);
            let lost = lost.inside(part).into_iter();
            lost.for_each(|lost| neighbours.has_lost(self.offsets(lost)));
        }
    }
}
