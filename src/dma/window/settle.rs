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
    /// front of its range. Mapping one tells: EEXIST says that it is still there, success that it was
    /// gone and is back, and EFAULT or EHWPOISON that it was gone and is: the kernel looks for other
    /// areas first and pins pages afterwards (iopt_map_pages). ENOENT from another unmap would prove nothing. What
    /// can't be told now is asked again before the range next changes.
    ///
    /// What was gone comes back as far as devices may reach it.
    fn settle(
        &self,
        pieces: Spans<Iova>,
        asked: Span<Iova>,
        neighbours: &mut Neighbours,
    ) -> Result<()> {
        let mut result = Ok(());
        for piece in pieces {
            let parts = self.admissible(piece, neighbours);
            let first = Span::between(piece.first(), piece.first() + PAGE_SIZE);
            let tried = parts.first().copied().unwrap_or(first);
            match self.map_by(self.path(), tried) {
                Err(call) if call.errno == libc::EEXIST => {
                    self.state().ledger.set_doubtful(piece, false);
                    continue;
                }
                Ok(()) => {
                    self.strike_out(piece);
                    self.enter(tried);
                    if parts.is_empty() {
                        self.unmap_again(tried);
                    }
                }
                Err(call) if [libc::EFAULT, libc::EHWPOISON].contains(&call.errno) => {
                    self.strike_out(piece);
                }
                Err(call) => {
                    self.state().ledger.set_doubtful(piece, true);
                    self.lose(&parts, asked, neighbours);
                    result = result.and(Err(call));
                    continue;
                }
            }
            let mut missing = RunSet::of(&parts);
            // All of it was tried, and some page of it is in the way.
            if parts.first() == Some(&piece) {
                missing.remove(asked);
            }
            for part in missing.inside(piece) {
                let gaps = self.state().ledger.gaps(part);
                gaps.into_iter()
                    .for_each(|gap| self.refill(gap, asked, neighbours));
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
        let parts = (neighbours.admissible)(self.offsets(area)).into_iter();
        parts.map(|part| self.iovas_at(part)).collect()
    }

    /// Maps a part that was out for a moment. What can't be mapped is lost, but for what is `asked` for,
    /// of which the caller hears.
    pub(super) fn refill(&self, part: Span<Iova>, asked: Span<Iova>, neighbours: &mut Neighbours) {
        let Err(error) = self.fill(part) else {
            return;
        };
        limited!(error, "devices lose {}: {error}", self.offsets(part));
        let left = self.state().ledger.gaps(part);
        self.lose(&left, asked, neighbours);
    }

    /// Devices can't reach these parts, or nobody knows.
    fn lose(&self, parts: &[Span<Iova>], asked: Span<Iova>, neighbours: &mut Neighbours) {
        for &part in parts {
            let mut lost = RunSet::of(&[part]);
            lost.remove(asked);
            let lost = lost.inside(part).into_iter();
            neighbours.lost.extend(lost.map(|lost| self.offsets(lost)));
        }
    }
}
