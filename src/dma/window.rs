// SPDX-License-Identifier: MIT OR Apache-2.0
//! A range of a block, shown to the devices of one IOAS.

use super::context::Context;
use super::ledger::Ledger;
use super::strategy::{How, Removal, Removals, Strategy, StrategyKind};
use super::{DmaPath, DmaSplit};
use crate::attributes::Attribute;
use crate::error::{Doing, Error, Result};
use crate::kernel::{CallResult, DeviceAccess, Ioas, Kernel};
use crate::plane::Planes;
use crate::run_set::{RunSet, Spans};
use crate::stats::BlockCounters;
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};
use crate::throttle::limited;
use crate::units::{Iova, Offset, Span, PAGE_SIZE};
use log::{debug, warn};
use std::os::fd::RawFd;

/// Where a window is to be.
#[derive(Clone, Copy, Debug)]
pub struct WindowConfig {
    /// /dev/iommu. Duplicated: the caller's own may be closed afterwards.
    pub iommufd: RawFd,
    /// The IOAS in it. A device must be attached already: without one the kernel maps lazily, and
    /// refusals come when it is too late to act on them.
    ///
    /// It has to outlive the window: the kernel gives the number of an IOAS that is destroyed to the next
    /// one, and guest memory would go to the devices of that. So remove the window first. If that comes
    /// too late it is still well, as long as the number is nobody's.
    pub ioas_id: u32,
    /// First byte of the block that the window shows.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Where devices see it. All addresses of the window are its own, also where nothing is mapped because a page
    /// is private: one unmap may go across these.
    pub iova: u64,
    /// Devices may read only.
    pub readonly: bool,
}

impl WindowConfig {
    /// The part of `block` that it names. EINVAL if that makes no sense.
    pub(crate) fn span_in(&self, block: Span<Offset>) -> Result<Span<Offset>> {
        Ok(View::of(self, block)?.span)
    }
}

/// From so many areas on a window is worth a line in the log.
const MANY_AREAS: u64 = 1 << 16;

/// One IOAS and the range of IOVAs in it that shows part of a block.
#[derive(Debug)]
pub struct Window {
    kernel: Arc<dyn Kernel>,
    planes: Arc<Planes>,
    counters: Arc<BlockCounters>,
    kind: StrategyKind,
    strategy: Box<dyn Strategy>,
    context: Arc<Context>,
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
    /// Nobody was given it.
    abandoned: bool,
}

/// What a look at a window's books says of a range.
enum Look<T> {
    /// All is as it is to be.
    Nothing,
    /// One call will do.
    Simple(T),
    /// It takes another look.
    Other,
}

/// Which part of the block devices see, and where.
#[derive(Clone, Copy, Debug)]
struct View {
    span: Span<Offset>,
    iova: Iova,
}

impl View {
    fn of(config: &WindowConfig, block: Span<Offset>) -> Result<Self> {
        let span = Span::new(Offset(config.offset), config.length)
            .filter(|span| block.contains(span))
            .ok_or_else(|| {
                Error::Invalid(format!(
                    "a DMA window of {:#x} bytes at offset {:#x} is empty, not page aligned, or \
                     not in the block",
                    config.length, config.offset
                ))
            })?;
        if Span::new(Iova(config.iova), config.length).is_none() {
            return Err(Error::Invalid(format!(
                "a DMA window of {:#x} bytes can't be at iova {:#x}",
                config.length, config.iova
            )));
        }
        Ok(Self {
            span,
            iova: Iova(config.iova),
        })
    }

    fn all_iovas(&self) -> Span<Iova> {
        self.span.translate(&self.span, self.iova)
    }

    fn iovas(&self, span: Span<Offset>) -> Option<Span<Iova>> {
        let part = self.span.intersection(&span)?;
        Some(self.span.translate(&part, self.iova))
    }

    /// What to add to an offset for its IOVA.
    fn shift(&self) -> u64 {
        self.iova.0.wrapping_sub(self.span.first())
    }

    /// Whether what both show is at the same IOVAs.
    fn agrees(&self, other: &Self) -> bool {
        self.shift() == other.shift()
    }

    /// Both, and what lies between them.
    fn hull(&self, other: &Self) -> Self {
        let start = self.span.first().min(other.span.first());
        let end = self.span.end().max(other.span.end());
        Self {
            span: Span::between(start, end),
            iova: Iova(self.iova.0.min(other.iova.0)),
        }
    }
}

fn access_of(config: &WindowConfig) -> DeviceAccess {
    if config.readonly {
        DeviceAccess::Read
    } else {
        DeviceAccess::ReadWrite
    }
}

/// Pages that a change of others may take along: those in one area with them.
pub(crate) struct Neighbours<'a> {
    /// The parts of a range that devices may reach. Nothing else is ever mapped that was not asked for.
    admissible: &'a dyn Fn(Span<Offset>) -> Spans<Offset>,
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
            (Some(reason), None) => Err(Error::Unsupported(format!(
                "dma-split=cut can't be: {reason}"
            ))),
        }
    }
}

impl Window {
    /// A window that shows nothing yet.
    pub(crate) fn new(parts: WindowParts, config: &WindowConfig) -> Result<Self> {
        let view = View::of(config, parts.planes.block())?;
        let context = Context::open(&parts.kernel, config.iommufd)?;
        let ioas = Ioas {
            iommufd: context.fd(),
            id: config.ioas_id,
        };
        let kind = parts.choose(&context, ioas, view.all_iovas())?;
        debug!("{} is mapped by the strategy {kind}", view.span);
        Ok(Self {
            kernel: parts.kernel,
            planes: parts.planes,
            counters: parts.counters,
            kind,
            strategy: kind.strategy(),
            context,
            ioas_id: config.ioas_id,
            number: parts.number,
            access: access_of(config),
            shift: view.shift(),
            state: Mutex::new(State {
                view,
                ledger: Ledger::default(),
                path: parts.path,
                closing: false,
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

    /// It could not be made, and its maker has heard so: the block closes it as soon as that works.
    pub(crate) fn abandon(&self) {
        self.state().abandoned = true;
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

    /// The same, for them to reach it no more.
    fn look_for_areas(&self, span: Span<Offset>) -> Look<Removal> {
        let state = self.state();
        let Some(iovas) = state.view.iovas(span) else {
            return Look::Nothing;
        };
        let whole = match (state.ledger.look(iovas), self.kind) {
            (Some(false), _) => return Look::Nothing,
            (Some(true), StrategyKind::Cut) => state.ledger.is_whole(iovas),
            (Some(true), StrategyKind::Page) if iovas.size_bytes() == PAGE_SIZE => true,
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

    /// Maps a range without areas. On failure some of its areas are there.
    fn fill(&self, gap: Span<Iova>) -> Result<()> {
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
                Error::Invalid(format!(
                    "{span} can't leave a DMA window that is mapped whole"
                ))
            })?;
            for removal in removals {
                self.carry_out(&removal, iovas, neighbours)?;
            }
        }
        Ok(())
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
            let admissible = self.admissible(part, neighbours);
            let mut leaving = RunSet::of(&[part]);
            admissible.iter().for_each(|&run| leaving.remove(run));
            let leaving = leaving.inside(part).into_iter();
            neighbours.left.extend(leaving.map(|run| self.offsets(run)));
            staying.extend(admissible);
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

    /// What failed for want of an IOAS has not failed: nobody reaches anything by the window any more.
    fn unless_ended(&self, result: Result<()>, neighbours: &mut Neighbours) -> Result<()> {
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
    fn ends_with_ioas(&self) -> bool {
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

    /// The parts of an area that devices may reach.
    fn admissible(&self, area: Span<Iova>, neighbours: &Neighbours) -> Spans<Iova> {
        if self.state().closing {
            return Spans::new();
        }
        let parts = (neighbours.admissible)(self.offsets(area)).into_iter();
        parts.map(|part| self.iovas_at(part)).collect()
    }

    /// Maps a part that was out for a moment. What can't be mapped is lost, but for what is `asked` for,
    /// of which the caller hears.
    fn refill(&self, part: Span<Iova>, asked: Span<Iova>, neighbours: &mut Neighbours) {
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

    /// Finds out what an unmap that failed has done. A cut may have removed areas that lie in its
    /// range, and nothing beyond.
    fn settle_after_failure(
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

    /// Shows another part of the block, which overlaps or adjoins the old one: the same IOAS, access
    /// and IOVA for an offset. `shared` are the shared pages of the new part that it may not show yet, or
    /// not any more in between. The caller holds what comes and what goes, widened to areas.
    ///
    /// Devices reach what is common all the time, except where it is one kernel area with what goes.
    /// On failure its view is what it was, or, if taking pages away failed, both parts; areas of it
    /// may be [`missing`](Window::missing), which the caller admits again or quarantines.
    pub(crate) fn reshape(
        &self,
        config: &WindowConfig,
        shared: &[Span<Offset>],
        neighbours: &mut Neighbours,
    ) -> Result<()> {
        let new = View::of(config, self.planes.block())?;
        let old = self.state().view;
        if !new.agrees(&old) || config.ioas_id != self.ioas_id || access_of(config) != self.access {
            return Err(Error::Invalid(format!(
                "a DMA window of {} can't become one of {}: IOAS, access or iova differ",
                old.span, new.span
            )));
        }
        let both = old.hull(&new);
        let parts = RunSet::of(&[old.span, new.span]);
        if parts.runs() != 1 {
            return Err(Error::Invalid(format!(
                "a DMA window of {} can't become one of {}: they are apart",
                old.span, new.span
            )));
        }
        let beyond = |view: &View| {
            let mut rest = parts.clone();
            rest.remove(view.span);
            rest.inside(both.span)
        };
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
                Ok(()) => self.state().view = old,
                // The view stays: conversions must find what is mapped.
                Err(error) => limited!(error, "after a window that could not be reshaped: {error}"),
            }
            return Err(error);
        }
        for part in beyond(&new) {
            self.withdraw(part, neighbours)?;
        }
        self.state().view = new;
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

    fn removals(&self, iovas: Span<Iova>) -> Option<Removals> {
        let state = self.state();
        self.strategy.removals(&state.ledger, iovas)
    }

    /// Finds out about what is doubtful of the areas that `asked` has a page of: of all of each where the
    /// caller holds it, since it goes and comes as a whole, and where it can be cut of what he asks for.
    fn settle_doubtful(&self, asked: Span<Iova>, neighbours: &mut Neighbours) -> Result<()> {
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
    fn unmap_again(&self, gap: Span<Iova>) {
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

    fn unmap(&self, iovas: Span<Iova>) -> CallResult<()> {
        self.counters.unmap_calls.add(1);
        self.kernel.dma_unmap(self.ioas(), iovas)
    }

    fn map(&self, area: Span<Iova>) -> Result<()> {
        self.map_on(self.path(), area)
    }

    fn map_on(&self, path: DmaPath, area: Span<Iova>) -> Result<()> {
        let mut result = self.map_by(path, area);
        if path == DmaPath::Auto {
            let by_address = matches!(&result, Err(call) if call.errno == libc::EINVAL);
            if by_address {
                // memfd_pin_folios takes shmem and hugetlbfs files only (Linux 7.3). A reserved
                // IOVA is EINVAL too, but by address as well: then nothing has been found out.
                result = self.map_by(DmaPath::Address, area);
            }
            if result.is_ok() {
                self.found_path(by_address);
            }
        }
        result.doing(|| {
            format!(
                "mapping {} for devices at {area} of IOAS {}",
                self.offsets(area),
                self.ioas_id
            )
        })
    }

    fn found_path(&self, by_address: bool) {
        let backing = self.planes.backing();
        if by_address {
            self.state().path = DmaPath::Address;
            limited!(
                info,
                "DMA to this {backing} block goes by address: the kernel refuses to pin its file \
                 (IOMMU_IOAS_MAP_FILE: EINVAL)"
            );
        } else {
            self.state().path = DmaPath::Fd;
            limited!(info, "DMA to this {backing} block goes by fd");
        }
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

    fn map_by(&self, path: DmaPath, area: Span<Iova>) -> CallResult<()> {
        let offsets = self.offsets(area);
        match path {
            DmaPath::Auto | DmaPath::Fd => {
                let file = self.planes.file(Attribute::Shared);
                self.kernel
                    .dma_map_file(self.ioas(), file, offsets, area.start(), self.access)?;
                self.counters.map_file_calls.add(1);
            }
            DmaPath::Address => {
                let mapping = self.planes.mapping();
                self.kernel.dma_map_address(
                    self.ioas(),
                    mapping,
                    offsets,
                    area.start(),
                    self.access,
                )?;
                self.counters.map_address_calls.add(1);
            }
        }
        Ok(())
    }

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
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            limited!(error, "{error}");
        }
    }
}
