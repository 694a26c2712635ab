// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a window ends: by its owner, or with its IOAS.
//!
//! Invariant: from the first attempt on it takes nothing in any more. What could not be unmapped stays in its books,
//! and conversions go on taking their pages out of it.

use super::Window;
use crate::dma::Neighbours;
use crate::error::{Doing, Result};
use crate::run_set::Spans;
use crate::throttle::limited;

impl Window {
    /// Unmaps all of it, area by area if need be, and shows nothing more. On failure areas are left:
    /// conversions still have to take their pages out. If the IOAS has been destroyed, nothing is
    /// left. The caller holds the range, or is the last owner.
    pub(crate) fn close(&self) -> Result<()> {
        let all = {
            let mut state = self.state();
            state.closing = true;
            state.view.all_iovas()
        };
        // Nothing of it is to be shown.
        let none = |_| Spans::new();
        let settled = self.settle_doubtful(all, &mut Neighbours::new(&none));
        let runs = self.state().ledger.runs(all);
        let mut result = Ok(());
        for run in runs {
            if self.unmap(run).is_ok() {
                self.strike_out(run);
                continue;
            }
            // One area that refuses must not keep the others.
            let areas = self.state().ledger.overlapping(run);
            for area in areas {
                match self.unmap(area) {
                    Ok(()) => self.strike_out(area),
                    Err(call) => {
                        self.state().ledger.set_doubtful(area, true);
                        result = Err(call);
                    }
                }
            }
        }
        let left = self.mapped().1;
        if left == 0 {
            return Ok(());
        }
        if self.context.has_lost(self.ioas()) {
            self.strike_out(all);
            return Ok(());
        }
        settled?;
        result.doing(|| {
            format!(
                "closing a DMA window: {left} areas may stay mapped in IOAS {}",
                self.ioas_id
            )
        })
    }

    /// What failed for want of an IOAS has not failed: nobody reaches anything by the window any more.
    pub(super) fn unless_ended(
        &self,
        result: Result<()>,
        neighbours: &mut Neighbours,
    ) -> Result<()> {
        match result {
            // ENODEV: it was destroyed after the context was pointed at it.
            Err(error)
                if [libc::ENOENT, libc::ENODEV].contains(&error.errno())
                    && self.ends_with_ioas() =>
            {
                neighbours.lost.clear();
                Ok(())
            }
            result => result,
        }
    }

    /// Whether the IOAS has been destroyed, which has unmapped all: the window shows nothing from now on.
    pub(super) fn ends_with_ioas(&self) -> bool {
        if !self.context.has_lost(self.ioas()) {
            return false;
        }
        let (all, known) = {
            let mut state = self.state();
            let known = std::mem::replace(&mut state.closing, true);
            (state.view.all_iovas(), known)
        };
        self.strike_out(all);
        if !known {
            limited!(
                error,
                "IOAS {} has been destroyed before its DMA window was removed: devices reach nothing of {} \
                 by it any more",
                self.ioas_id,
                self.span()
            );
        }
        true
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            limited!(error, "{error}");
        }
    }
}
