// SPDX-License-Identifier: MIT OR Apache-2.0
//! A range of a block, shown to the devices of one IOAS.

use super::ledger::Ledger;
use super::strategy::Strategy;
use super::DmaPath;
use crate::attributes::Attribute;
use crate::error::{Doing, Error, Result};
use crate::kernel::{CallResult, DeviceAccess, Ioas, Kernel};
use crate::plane::Planes;
use crate::run_set::RunSet;
use crate::stats::BlockCounters;
use crate::units::{Iova, Offset, Span};
use log::{error, info};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where a window is to be.
#[derive(Clone, Copy, Debug)]
pub struct WindowConfig {
    /// /dev/iommu. Duplicated: the caller's own may be closed afterwards.
    pub iommufd: RawFd,
    /// The IOAS in it. A device must be attached already: without one the kernel maps lazily, and
    /// refusals come when it is too late to act on them.
    pub ioas_id: u32,
    /// First byte of the block that the window shows.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Where devices see it.
    pub iova: u64,
    /// Devices may read only.
    pub readonly: bool,
}

/// One IOAS and the range of IOVAs in it that shows part of a block.
#[derive(Debug)]
pub struct Window {
    kernel: Arc<dyn Kernel>,
    planes: Arc<Planes>,
    counters: Arc<BlockCounters>,
    strategy: &'static dyn Strategy,
    iommufd: OwnedFd,
    ioas_id: u32,
    access: DeviceAccess,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    view: View,
    ledger: Ledger,
    path: DmaPath,
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

    fn offsets(&self, area: Span<Iova>) -> Span<Offset> {
        self.all_iovas().translate(&area, self.span.start())
    }

    /// Whether what both show is at the same IOVAs.
    fn agrees(&self, other: &Self) -> bool {
        let shift = |view: &Self| view.iova.0.wrapping_sub(view.span.first());
        shift(self) == shift(other)
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

/// What a window needs of its block.
pub(crate) struct WindowParts {
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) planes: Arc<Planes>,
    pub(crate) counters: Arc<BlockCounters>,
    pub(crate) strategy: &'static dyn Strategy,
    pub(crate) path: DmaPath,
}

impl Window {
    /// A window that shows nothing yet.
    pub(crate) fn new(parts: WindowParts, config: &WindowConfig) -> Result<Self> {
        let view = View::of(config, parts.planes.block())?;
        let iommufd = parts
            .kernel
            .duplicate(config.iommufd)
            .doing(|| "keeping the iommufd of a DMA window open".into())?;
        Ok(Self {
            kernel: parts.kernel,
            planes: parts.planes,
            counters: parts.counters,
            strategy: parts.strategy,
            iommufd,
            ioas_id: config.ioas_id,
            access: access_of(config),
            state: Mutex::new(State {
                view,
                ledger: Ledger::default(),
                path: parts.path,
            }),
        })
    }

    /// The part of the block that it shows.
    pub fn span(&self) -> Span<Offset> {
        self.state().view.span
    }

    /// How mappings name memory: [`DmaPath::Auto`] until the first one.
    pub fn path(&self) -> DmaPath {
        self.state().path
    }

    /// Bytes that devices can reach through it, and the kernel areas that it takes.
    pub fn mapped(&self) -> (u64, u64) {
        let state = self.state();
        (state.ledger.bytes(), state.ledger.len())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ioas(&self) -> Ioas<'_> {
        Ioas {
            iommufd: self.iommufd.as_fd(),
            id: self.ioas_id,
        }
    }

    /// Lets devices reach every page of `span` that the window shows. On failure it shows what it
    /// showed before.
    ///
    /// The caller holds the range and knows that its pages are, or are about to be, shared.
    pub(crate) fn admit(&self, span: Span<Offset>) -> Result<()> {
        let mut state = self.state();
        let Some(iovas) = state.view.iovas(span) else {
            return Ok(());
        };
        let doubtful = state.ledger.doubtful(iovas);
        self.settle(&mut state, doubtful)?;
        let mut mapped = Vec::new();
        for gap in state.ledger.gaps(iovas) {
            for area in self.strategy.areas(gap) {
                if let Err(error) = self.map(&mut state, area) {
                    for area in mapped.into_iter().rev() {
                        self.unmap_again(&mut state, area);
                    }
                    return Err(error);
                }
                state.ledger.insert(area);
                mapped.push(area);
            }
        }
        Ok(())
    }

    /// Takes every page of `span` out of the window. On failure the window shows what it showed
    /// before, but for areas that the kernel may have lost and then refused to map again: the
    /// ledger goes on holding them for mapped.
    pub(crate) fn withdraw(&self, span: Span<Offset>) -> Result<()> {
        let mut state = self.state();
        let Some(iovas) = state.view.iovas(span) else {
            return Ok(());
        };
        let doubtful = state.ledger.doubtful(iovas);
        self.settle(&mut state, doubtful)?;
        let removals = self
            .strategy
            .removals(&state.ledger, iovas)
            .ok_or_else(|| {
                Error::Invalid(format!(
                    "{span} can't leave a DMA window that is mapped whole"
                ))
            })?;
        for removal in removals {
            self.counters.unmap_calls.add(1);
            if let Err(call) = self.kernel.dma_unmap(self.ioas(), removal) {
                let areas = state.ledger.overlapping(removal);
                if let Err(error) = self.settle(&mut state, areas) {
                    error!("after an unmap that failed: {error}");
                }
                return Err(call)
                    .doing(|| format!("taking {span} out of IOAS {} ({removal})", self.ioas_id));
            }
            state.ledger.remove(removal);
        }
        Ok(())
    }

    /// Shows another part of the block, where it may keep what both parts have in common: the same
    /// IOAS, access and IOVA for an offset. `shared` are the shared pages of the new part.
    ///
    /// Devices reach what is common all the time, except where it is one kernel area with what goes.
    /// On failure its view is what it was, or, if only taking pages away failed, both parts; areas of
    /// it may be missing, which the caller admits again.
    pub(crate) fn reshape(&self, config: &WindowConfig, shared: &[Span<Offset>]) -> Result<()> {
        let new = View::of(config, self.planes.block())?;
        let old = self.state().view;
        if !new.agrees(&old) || config.ioas_id != self.ioas_id || access_of(config) != self.access {
            return Err(Error::Invalid(format!(
                "a DMA window of {} can't become one of {}: IOAS, access or iova differ",
                old.span, new.span
            )));
        }
        let gone = |view: &View| {
            let mut parts = RunSet::default();
            parts.insert(old.hull(&new).span);
            parts.remove(view.span);
            parts.inside(old.hull(&new).span)
        };
        self.state().view = old.hull(&new);
        // In one area with what stays? Then all of it goes and comes back.
        for part in gone(&new) {
            let mut state = self.state();
            let iovas = state.view.iovas(part).expect("the hull has both views");
            if self.strategy.removals(&state.ledger, iovas).is_none() {
                drop(state);
                let taken = self.withdraw(old.hull(&new).span);
                state = self.state();
                if taken.is_err() {
                    state.view = old;
                    return taken;
                }
                break;
            }
        }
        if let Err(error) = shared.iter().try_for_each(|&run| self.admit(run)) {
            for part in gone(&old) {
                if let Err(error) = self.withdraw(part) {
                    error!("undoing: {error}");
                    return Err(error);
                }
            }
            self.state().view = old;
            return Err(error);
        }
        for part in gone(&new) {
            self.withdraw(part)?;
        }
        self.state().view = new;
        Ok(())
    }

    /// Finds out about areas after an unmap that failed, which may have removed some at the front
    /// of its range. Mapping an area tells: EEXIST says that it is still there, success that it was
    /// gone and is back. ENOENT from another unmap would prove nothing. What can't be told now is
    /// asked again before the range next changes.
    fn settle(&self, state: &mut State, areas: Vec<Span<Iova>>) -> Result<()> {
        let mut result = Ok(());
        for area in areas {
            let found = match self.map_by(state, area) {
                Err(call) if call.errno == libc::EEXIST => Ok(()),
                other => other,
            };
            state.ledger.set_doubtful(area, found.is_err());
            result = result.and(found);
        }
        result.doing(|| format!("finding out what IOAS {} still maps", self.ioas_id))
    }

    /// Undoes a map of this very area.
    fn unmap_again(&self, state: &mut State, area: Span<Iova>) {
        self.counters.unmap_calls.add(1);
        match self.kernel.dma_unmap(self.ioas(), area) {
            Ok(()) => state.ledger.remove(area),
            Err(call) => {
                state.ledger.set_doubtful(area, true);
                error!(
                    "{area} stays mapped in IOAS {} although it was to be undone: {call}",
                    self.ioas_id
                );
            }
        }
    }

    fn map(&self, state: &mut State, area: Span<Iova>) -> Result<()> {
        let mut result = self.map_by(state, area);
        if state.path == DmaPath::Auto {
            state.path = DmaPath::Fd;
            match &result {
                // memfd_pin_folios takes shmem and hugetlbfs files only (Linux 7.3).
                Err(call) if call.errno == libc::EINVAL => {
                    info!(
                        "DMA to this {} block goes by address: {call} for its file, which this \
                         kernel can't pin by fd",
                        self.planes.backing()
                    );
                    state.path = DmaPath::Address;
                    result = self.map_by(state, area);
                }
                _ => info!("DMA to this {} block goes by fd", self.planes.backing()),
            }
        }
        result.doing(|| {
            format!(
                "mapping {} for devices at {area} of IOAS {}",
                state.view.offsets(area),
                self.ioas_id
            )
        })
    }

    fn map_by(&self, state: &State, area: Span<Iova>) -> CallResult<()> {
        let offsets = state.view.offsets(area);
        match state.path {
            DmaPath::Auto | DmaPath::Fd => {
                self.counters.map_file_calls.add(1);
                let file = self.planes.file(Attribute::Shared);
                self.kernel
                    .dma_map_file(self.ioas(), file, offsets, area.start(), self.access)
            }
            DmaPath::Address => {
                self.counters.map_address_calls.add(1);
                let mapping = self.planes.mapping();
                self.kernel.dma_map_address(
                    self.ioas(),
                    mapping,
                    offsets,
                    area.start(),
                    self.access,
                )
            }
        }
    }

    /// Unmaps all of it, area by area if need be. What the kernel refuses to unmap is reported; the
    /// IOAS, which is the caller's, takes it along when it is destroyed.
    pub(crate) fn close(&self) -> Result<()> {
        let mut state = self.state();
        let whole = state.view.all_iovas();
        let doubtful = state.ledger.doubtful(whole);
        if let Err(error) = self.settle(&mut state, doubtful) {
            error!("{error}");
        }
        let mut first_error = None;
        let mut unmap = |state: &mut State, span: Span<Iova>| {
            self.counters.unmap_calls.add(1);
            let result = self.kernel.dma_unmap(self.ioas(), span);
            match result {
                Ok(()) => state.ledger.remove(span),
                Err(call) => {
                    first_error.get_or_insert(call);
                }
            }
            state.ledger.overlapping(span).is_empty()
        };
        if state.ledger.len() != 0 && !unmap(&mut state, whole) {
            for area in state.ledger.overlapping(whole) {
                unmap(&mut state, area);
            }
        }
        match (state.ledger.len(), first_error) {
            (0, _) | (_, None) => Ok(()),
            (left, Some(call)) => Err(call).doing(|| {
                format!(
                    "closing a DMA window: {left} areas stay mapped in IOAS {}",
                    self.ioas_id
                )
            }),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            error!("{error}");
        }
    }
}
