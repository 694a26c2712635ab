// SPDX-License-Identifier: MIT OR Apache-2.0
//! A range of a block, shown to the devices of one IOAS.
//!
//! Invariant: the [`Ledger`] has every area of the window that the kernel has or may have. It is locked for
//! moments only, never across a call: who changes what a window shows of a range holds the range, and what happens
//! elsewhere in the window need not wait.

mod calls;
mod change;
mod close;
mod reshape;
mod settle;

use super::claims::Claim;
use super::context::Context;
use super::ledger::Ledger;
use super::strategy::{Strategy, StrategyKind};
use super::view::View;
use super::{DmaPath, DmaSplit, WindowConfig};
use crate::error::{Error, Result};
use crate::kernel::{DeviceAccess, Ioas, Kernel};
use crate::plane::Planes;
use crate::run_set::Spans;
use crate::stats::BlockCounters;
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};
use crate::throttle::limited;
use crate::units::{Iova, Offset, Span};
use log::{debug, warn};
use std::os::fd::BorrowedFd;

/// From so many areas on a window is worth a line in the log.
const MANY_AREAS: u64 = 1 << 16;

/// One IOAS and the range of IOVAs in it that shows part of a block.
#[derive(Debug)]
pub(crate) struct Window {
    kernel: Arc<dyn Kernel>,
    planes: Arc<Planes>,
    counters: Arc<BlockCounters>,
    kind: StrategyKind,
    strategy: Box<dyn Strategy>,
    context: Arc<Context>,
    claim: Claim,
    ioas_id: u32,
    number: u64,
    access: DeviceAccess,
    /// From offset to IOVA, for the life of the window.
    shift: u64,
    state: Mutex<State>,
}

/// Locked for moments only, never across a call.
#[derive(Debug)]
struct State {
    view: View,
    ledger: Ledger,
    path: DmaPath,
    /// It was to be closed and may be mapped still: nothing comes in any more.
    closing: bool,
    /// Its IOAS is gone.
    ended: bool,
    /// Nobody was given it.
    abandoned: bool,
}

/// What a window needs of its block.
pub(crate) struct WindowParts {
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) planes: Arc<Planes>,
    pub(crate) counters: Arc<BlockCounters>,
    /// Whether pages may become private.
    pub(crate) confidential: bool,
    pub(crate) split: DmaSplit,
    pub(crate) path: DmaPath,
    /// Of its own: to lock it by.
    pub(crate) number: u64,
    /// What messages call the block.
    pub(crate) name: String,
}

impl WindowParts {
    /// The strategy for a window at `iovas`, which is to be new. Says in the log why it is not the
    /// best. Fails where all would.
    fn choose(&self, context: &Context, ioas: Ioas, iovas: Span<Iova>) -> Result<StrategyKind> {
        if !self.confidential {
            return Ok(StrategyKind::Whole);
        }
        let otherwise = match self.split {
            DmaSplit::Page => return Ok(StrategyKind::Page),
            DmaSplit::Unit(bytes) => return Ok(StrategyKind::Unit(bytes)),
            DmaSplit::Cut => None,
            // Whoever names a unit accepts that neighbours fault now and then.
            DmaSplit::Auto { unit: Some(bytes) } => Some(StrategyKind::Unit(bytes)),
            DmaSplit::Auto { unit: None } => Some(StrategyKind::Page),
        };
        match (context.try_cut(ioas, iovas)?, otherwise) {
            (None, _) => Ok(StrategyKind::Cut),
            (Some(reason), Some(kind)) => {
                limited!(warn, "dma-split={kind} instead of cut: {reason}");
                Ok(kind)
            }
            (Some(reason), None) => {
                Err(Error::unsupported("dma-split=cut can't be").because(reason))
            }
        }
    }
}

impl Window {
    /// A window that shows nothing yet.
    pub(crate) fn new(
        parts: WindowParts,
        iommufd: BorrowedFd,
        config: &WindowConfig,
    ) -> Result<Self> {
        let view = View::of(config, parts.planes.block())?;
        let context = Context::open(&parts.kernel, iommufd)?;
        let ioas = Ioas {
            iommufd: context.fd(),
            id: config.ioas_id,
        };
        // Before anything is tried there.
        let claim = Claim::new(&context, ioas.id, view.all_iovas(), &parts.name)?;
        let kind = parts.choose(&context, ioas, view.all_iovas())?;
        debug!("{} is mapped by the strategy {kind}", view.span);
        Ok(Self {
            kernel: parts.kernel,
            planes: parts.planes,
            counters: parts.counters,
            kind,
            strategy: kind.strategy(),
            context,
            claim,
            ioas_id: config.ioas_id,
            number: parts.number,
            access: config.access(),
            shift: view.shift(),
            state: Mutex::new(State {
                view,
                ledger: Ledger::default(),
                path: parts.path,
                closing: false,
                ended: false,
                abandoned: false,
            }),
        })
    }

    /// The part of the block that it shows.
    pub fn span(&self) -> Span<Offset> {
        self.state().view.span
    }

    /// What no block and no other window has for a number.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// How mappings name memory: [`DmaPath::Auto`] until the first one.
    pub fn path(&self) -> DmaPath {
        self.state().path
    }

    /// In which areas it is mapped.
    pub fn strategy(&self) -> StrategyKind {
        self.kind
    }

    /// Bytes that devices can reach through it, and the kernel areas that it takes.
    pub fn mapped(&self) -> (u64, u64) {
        let state = self.state();
        (state.ledger.bytes(), state.ledger.len())
    }

    /// Memory that its books take at most, but for a constant.
    pub(crate) fn footprint(&self) -> u64 {
        self.state().ledger.footprint()
    }

    /// Whether devices that reach a page of `span` by it pin that page, and so have memory for it.
    pub(crate) fn pins(&self, span: Span<Offset>) -> bool {
        let state = self.state();
        state.view.span.contains(&span) && !state.closing
    }

    /// Whether there is an IOAS to show anything in: for a window that maps nothing at first.
    pub(crate) fn check_ioas(&self) -> Result<()> {
        self.context.check(self.ioas())
    }

    /// It could not be made, and its maker has heard so, or its owner has gone: the block closes it as soon as
    /// that works.
    pub(crate) fn abandon(&self) {
        self.state().abandoned = true;
        self.claim.abandon();
    }

    /// Whether nobody but the block will close it.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.state().abandoned
    }

    /// The parts of `span` that it is to show and devices can't reach by it, or may not.
    pub(crate) fn missing(&self, span: Span<Offset>) -> Spans<Offset> {
        let state = self.state();
        if state.closing {
            return Spans::new();
        }
        let Some(iovas) = state.view.iovas(span) else {
            return Spans::new();
        };
        let gaps = state.ledger.gaps(iovas).into_iter();
        let doubtful = state.ledger.doubtful(iovas).into_iter();
        let doubtful = doubtful.filter_map(|area| area.intersection(&iovas));
        let missing = gaps.chain(doubtful);
        missing.map(|part| self.offsets(part)).collect()
    }

    /// The parts of `span` that devices reach by it, or may.
    pub(crate) fn shown(&self, span: Span<Offset>) -> Spans<Offset> {
        let state = self.state();
        let iovas = state.view.iovas(span);
        let mapped = iovas.map(|iovas| state.ledger.mapped(iovas));
        let mapped = mapped.into_iter().flatten();
        mapped.map(|part| self.offsets(part)).collect()
    }

    /// Whether there are any.
    pub(crate) fn maps(&self, span: Span<Offset>) -> bool {
        let state = self.state();
        let iovas = state.view.iovas(span);
        iovas.is_some_and(|iovas| state.ledger.maps(iovas))
    }

    fn enter(&self, area: Span<Iova>) {
        let mut state = self.state();
        let before = state.ledger.len();
        state.ledger.insert(area);
        let areas = state.ledger.len();
        drop(state);
        let doubled = self.counters.areas_changed(before, areas);
        // As often as it doubles: a guest can do it, but not without end.
        if doubled && areas >= MANY_AREAS && self.kind == StrategyKind::Cut {
            warn!(
                "IOAS {} has {areas} areas: the guest converts page by page, and each takes about \
                 400 bytes of the kernel",
                self.ioas_id
            );
        }
    }

    fn strike_out(&self, span: Span<Iova>) {
        let mut state = self.state();
        let before = state.ledger.len();
        state.ledger.remove(span);
        self.counters.areas_changed(before, state.ledger.len());
        if state.closing {
            self.claim.give_up(span);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ioas(&self) -> Ioas<'_> {
        Ioas {
            iommufd: self.context.fd(),
            id: self.ioas_id,
        }
    }

    /// The IOVAs of what the window shows of `span`; `None` where it shows nothing of it.
    fn iovas(&self, span: Span<Offset>) -> Option<Span<Iova>> {
        self.state().view.iovas(span)
    }

    /// Right whatever the view is at the moment: it never changes where an offset appears.
    fn offsets(&self, area: Span<Iova>) -> Span<Offset> {
        let first = area.first().wrapping_sub(self.shift);
        Span::between(first, first + area.size_bytes())
    }

    /// The opposite of [`Window::offsets`].
    fn iovas_at(&self, area: Span<Offset>) -> Span<Iova> {
        let first = area.first().wrapping_add(self.shift);
        Span::between(first, first + area.size_bytes())
    }
}
