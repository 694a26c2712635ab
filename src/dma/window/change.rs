// SPDX-License-Identifier: MIT OR Apache-2.0
//! How pages come into a window and leave it.
//!
//! Invariant: the ledger is changed after the call that changes the kernel, and by what that call is
//! known to have done. So at no time does the kernel map what the ledger has not, but for a call under way
//! whose caller holds the range.

use super::Window;
use crate::dma::strategy::{How, Removal, Removals, StrategyKind};
use crate::dma::{DmaPath, Neighbours};
use crate::error::{Doing, Error, Result};
use crate::run_set::Spans;
use crate::units::{Iova, Offset, Span, PAGE_SIZE};

/// What a look at a window's books says of a range.
enum Look<T> {
    /// All is as it is to be.
    Nothing,
    /// One call will do.
    Simple(T),
    /// It takes another look.
    Other,
}

impl Window {
    /// Lets devices reach every page of `span` that the window shows. On failure it shows what it
    /// showed before.
    ///
    /// The caller holds the range and knows that its pages are, or are about to be, shared. Holding
    /// the range is what makes it safe to make calls without the window's lock: nobody else touches
    /// areas there, and what happens elsewhere in the window need not wait.
    ///
    /// If the IOAS has been destroyed, there is nobody to reach them, and the window ends.
    pub(crate) fn admit(&self, span: Span<Offset>, neighbours: &mut Neighbours) -> Result<()> {
        let admitted = self.try_to_admit(span, neighbours);
        self.unless_ended(admitted, neighbours)
    }

    fn try_to_admit(&self, span: Span<Offset>, neighbours: &mut Neighbours) -> Result<()> {
        match self.look_for_gap(span) {
            Look::Nothing => return Ok(()),
            Look::Simple((area, path)) => {
                self.map_on(path, area)?;
                self.enter(area);
                return Ok(());
            }
            Look::Other => {}
        }
        let Some(iovas) = self.iovas(span) else {
            return Ok(());
        };
        if self.state().closing {
            return Ok(());
        }
        self.settle_doubtful(iovas, neighbours)?;
        let gaps = self.state().ledger.gaps(iovas);
        for (index, &gap) in gaps.iter().enumerate() {
            if let Err(error) = self.fill(gap) {
                for &gap in &gaps[..=index] {
                    self.unmap_again(gap);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// What there is to do for the devices to reach `span`: what nearly all conversions ask, with one look.
    fn look_for_gap(&self, span: Span<Offset>) -> Look<(Span<Iova>, DmaPath)> {
        let state = self.state();
        let iovas = match state.view.iovas(span) {
            Some(iovas) if !state.closing => iovas,
            _ => return Look::Nothing,
        };
        match state.ledger.look(iovas) {
            Some(true) => Look::Nothing,
            Some(false) if self.kind.is_one_area(self.offsets(iovas)) => {
                Look::Simple((iovas, state.path))
            }
            _ => Look::Other,
        }
    }

    /// Maps a range without areas. On failure some of its areas are there.
    pub(super) fn fill(&self, gap: Span<Iova>) -> Result<()> {
        for area in self.strategy.areas(self.offsets(gap)) {
            let area = self.iovas_at(area);
            self.map(area)?;
            self.enter(area);
        }
        Ok(())
    }

    /// Takes every page of `span` out of the window. On failure the window shows what it showed
    /// before, but for areas that the kernel may have lost and then refused to map again: the
    /// ledger goes on holding them for mapped. Parts of `span` may be out; admitting it
    /// again brings them back. The caller holds the range, widened to the strategy's unit.
    ///
    /// By the strategy `unit` neighbours of `span` are out for a moment. Those that devices may not have
    /// stay out, and those that the kernel refuses to map again, or to tell of, are lost.
    pub(crate) fn withdraw(&self, span: Span<Offset>, neighbours: &mut Neighbours) -> Result<()> {
        let withdrawn = self.try_to_withdraw(span, neighbours);
        self.unless_ended(withdrawn, neighbours)
    }

    fn try_to_withdraw(&self, span: Span<Offset>, neighbours: &mut Neighbours) -> Result<()> {
        match self.look_for_areas(span) {
            Look::Nothing => return Ok(()),
            Look::Simple(removal) => return self.carry_out(&removal, removal.span, neighbours),
            Look::Other => {}
        }
        let Some(iovas) = self.iovas(span) else {
            return Ok(());
        };
        self.settle_doubtful(iovas, neighbours)?;
        for part in self.own_addresses(iovas) {
            let removals = self.removals(part).ok_or_else(|| {
                Error::invalid(format!(
                    "{span} can't leave a DMA window that is mapped whole"
                ))
            })?;
            for removal in removals {
                self.carry_out(&removal, iovas, neighbours)?;
            }
        }
        Ok(())
    }

    /// The same, for them to reach it no more.
    fn look_for_areas(&self, span: Span<Offset>) -> Look<Removal> {
        let state = self.state();
        let Some(iovas) = state.view.iovas(span) else {
            return Look::Nothing;
        };
        let whole = match (state.ledger.look_at_ends(iovas), self.kind) {
            (Some((false, _)), _) => return Look::Nothing,
            (Some((true, whole)), StrategyKind::Cut) => whole,
            (Some((true, _)), StrategyKind::Page) if iovas.size_bytes() == PAGE_SIZE => true,
            _ => return Look::Other,
        };
        let how = match whole {
            true => How::Whole,
            false => How::Cut {
                mapped_bytes: iovas.size_bytes(),
            },
        };
        Look::Simple(Removal { span: iovas, how })
    }

    pub(super) fn removals(&self, iovas: Span<Iova>) -> Option<Removals> {
        let state = self.state();
        self.strategy.removals(&state.ledger, iovas)
    }

    /// Where a call may go from one area to the next: all of `iovas`, which are the window's own. Of one that is to
    /// be closed and could not be, others may have those between its areas by now.
    fn own_addresses(&self, iovas: Span<Iova>) -> Spans<Iova> {
        let state = self.state();
        match state.closing {
            true => state.ledger.mapped(iovas),
            false => Spans::from_elem(iovas, 1),
        }
    }

    /// One call of those that take `asked` out.
    fn carry_out(
        &self,
        removal: &Removal,
        asked: Span<Iova>,
        neighbours: &mut Neighbours,
    ) -> Result<()> {
        let unmapped = match removal.how {
            How::Cut { mapped_bytes } => {
                let (ioas, counters) = (self.ioas(), &self.counters);
                self.context.cut(ioas, removal.span, mapped_bytes, counters)
            }
            How::Whole | How::Remap(_) => self.unmap(removal.span),
        };
        if let Err(call) = unmapped {
            // Where there is no IOAS nothing is to be found out.
            let may_be_gone = [libc::ENOENT, libc::ENODEV].contains(&call.errno);
            if !may_be_gone || !self.ends_with_ioas() {
                self.settle_after_failure(removal, asked, neighbours);
            }
            return Err(call).doing(|| {
                format!(
                    "taking {} out of IOAS {} ({})",
                    self.offsets(asked),
                    self.ioas_id,
                    removal.span
                )
            });
        }
        self.strike_out(removal.span);
        let How::Remap(around) = &removal.how else {
            return Ok(());
        };
        self.counters.remap_windows.add(1);
        let mut staying = Spans::new();
        for &part in around {
            staying.extend(self.part_ways(part, neighbours));
        }
        let filled = staying.iter().try_for_each(|&part| self.fill(part));
        filled.inspect_err(|_| {
            // Some neighbour can't be mapped by itself: all is to be as it was.
            let gaps = self.state().ledger.gaps(removal.span);
            for gap in gaps {
                for part in self.admissible(gap, neighbours) {
                    self.refill(part, asked, neighbours);
                }
            }
        })
    }
}
