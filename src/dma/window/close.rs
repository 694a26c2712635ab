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
use crate::units::{Iova, Span};

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
        let _ = self.settle_closing(all);
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
        // A call that failed may have taken all the same, and so did the second one then.
        let settled = self.settle_closing(all);
        let (areas, left) = {
            let ledger = &self.state().ledger;
            (ledger.mapped(all), ledger.len())
        };
        if left == 0 {
            self.claim.keep(&[]);
            return Ok(());
        }
        if self.context.has_lost(self.ioas()) {
            self.end();
            return Ok(());
        }
        // Others may have what lies between them.
        self.claim.keep(&areas);
        settled?;
        result.doing(|| {
            format!(
                "closing a DMA window: {left} areas may stay mapped in IOAS {}",
                self.ioas_id
            )
        })
    }

    fn settle_closing(&self, all: Span<Iova>) -> Result<()> {
        // Nothing of it is to be shown, so nothing is lost; and whoever closes it heals what was to leave.
        let none = |_| Spans::new();
        let (settled, _) = Neighbours::during(&none, |none| self.settle_doubtful(all, none));
        settled
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
                neighbours.has_lost_nothing();
                Ok(())
            }
            result => result,
        }
    }

    /// It has ended with its IOAS: nothing is mapped, and what has its addresses is of another.
    fn end(&self) {
        let all = {
            let mut state = self.state();
            if !std::mem::replace(&mut state.ended, true) {
                self.counters.windows_lost.add(1);
            }
            state.closing = true;
            state.view.all_iovas()
        };
        self.strike_out(all);
        self.claim.keep(&[]);
    }

    /// Whether the IOAS has been destroyed, which has unmapped all: the window shows nothing from now on.
    pub(super) fn ends_with_ioas(&self) -> bool {
        if !self.context.has_lost(self.ioas()) {
            return false;
        }
        let is_known = self.state().closing;
        self.end();
        if !is_known {
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
        let left = {
            let state = self.state();
            state.ledger.mapped(state.view.all_iovas())
        };
        self.claim.leave_to_nobody(&left);
    }
}
