// SPDX-License-Identifier: MIT OR Apache-2.0
//! A window that shows another part of its block.
//!
//! Invariant: while that is under way the window's view is both parts, and after a failure it is still of all
//! that may be mapped: who converts a page finds every window that devices may reach it by.

use super::Window;
use crate::dma::view::View;
use crate::dma::{Neighbours, WindowConfig};
use crate::error::{Error, Result};
use crate::run_set::RunSet;
use crate::throttle::limited;
use crate::units::{Offset, Span};

impl Window {
    /// Shows another part of the block, which overlaps or adjoins the old one: the same IOAS, access
    /// and IOVA for an offset. `shared` are the shared pages of the new part that it may not show yet, or
    /// not any more in between. The caller holds what comes and what goes, widened to areas.
    ///
    /// Devices reach what is common all the time, except where it is one kernel area with what goes.
    /// On failure its view and its addresses are what they were, or, if taking pages away failed, both parts; areas of it
    /// may be [`missing`](Window::missing), which the caller admits again or quarantines.
    pub(crate) fn reshape(
        &self,
        config: &WindowConfig,
        shared: &[Span<Offset>],
        neighbours: &mut Neighbours,
    ) -> Result<()> {
        let new = View::of(config, self.planes.block())?;
        let old = self.state().view;
        if !new.agrees(&old) || config.ioas_id != self.ioas_id || config.access() != self.access {
            return Err(Error::invalid(format!(
                "a DMA window of {} can't become one of {}: IOAS, access or iova differ",
                old.span, new.span
            )));
        }
        let both = old.hull(&new);
        let parts = RunSet::of(&[old.span, new.span]);
        if parts.runs() != 1 {
            return Err(Error::invalid(format!(
                "a DMA window of {} can't become one of {}: they are apart",
                old.span, new.span
            )));
        }
        let beyond = |view: &View| {
            let mut rest = parts.clone();
            rest.remove(view.span);
            rest.inside(both.span)
        };
        let keeps = |view: &View| match self.state().closing {
            // It has its areas, wherever they are.
            true => {}
            false => self.claim.keep(&[view.all_iovas()]),
        };
        if !self.state().closing {
            self.claim.extend(both.all_iovas())?;
        }
        self.state().view = both;
        // In one area with what stays? Then that goes and comes back.
        let mut going = beyond(&new)
            .into_iter()
            .filter(|&part| self.is_divided(part));
        let gone = going.try_for_each(|part| self.take_areas(part, neighbours));
        let mut shared = shared.iter();
        let admitted = gone.and_then(|()| shared.try_for_each(|&run| self.admit(run, neighbours)));
        if let Err(error) = admitted {
            let mut going = beyond(&old).into_iter();
            let gone = going.try_for_each(|part| match self.is_divided(part) {
                true => self.take_areas(part, neighbours),
                false => self.withdraw(part, neighbours),
            });
            match gone {
                Ok(()) => {
                    self.state().view = old;
                    keeps(&old);
                }
                // The view stays: conversions must find what is mapped.
                Err(error) => limited!(error, "after a window that could not be reshaped: {error}"),
            }
            return Err(error);
        }
        for part in beyond(&new) {
            self.withdraw(part, neighbours)?;
        }
        self.state().view = new;
        keeps(&new);
        Ok(())
    }

    /// Whether an area reaches beyond `part` that can't leave in part.
    fn is_divided(&self, part: Span<Offset>) -> bool {
        let iovas = self.iovas(part);
        iovas.is_some_and(|iovas| self.removals(iovas).is_none())
    }

    /// Takes out whole areas that have a page of `part`.
    fn take_areas(&self, part: Span<Offset>, neighbours: &mut Neighbours) -> Result<()> {
        let iovas = self.iovas(part);
        let areas = iovas.map(|iovas| self.state().ledger.runs(iovas));
        let mut areas = areas.into_iter().flatten();
        areas.try_for_each(|area| self.withdraw(self.offsets(area), neighbours))
    }
}
