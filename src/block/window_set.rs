// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which devices reach what of a block: its windows, what is kept from all of them, and how that is put
//! right.
//!
//! Invariants, of pages whose range nobody has locked:
//!
//! 1. A private page, and one that the host has lost, is mapped in no window; where the kernel has refused
//!    to unmap it, it is quarantined.
//! 2. A shared page that is not lost is mapped in every window that shows it, or quarantined.
//!
//! Whoever calls has the range of the pages, widened by [`Core::lock_hull`]: so attributes stay what they
//! are, and nobody else changes windows there.

use super::core::Core;
use super::releaser::Releaser;
use super::unhealed::Unhealed;
use crate::attributes::Attribute;
use crate::dma::{DmaPath, Neighbours, Taken, Window, WindowConfig, WindowParts, PIECE};
use crate::error::{Cause, Error, Result};
use crate::plane::Backing;
use crate::run_set::{RunSet, Spans};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};
use crate::throttle::{limited, Class};
use crate::units::{Offset, Span};
use std::os::fd::BorrowedFd;

#[derive(Debug)]
pub(crate) struct WindowSet {
    core: Arc<Core>,
    releaser: Arc<Releaser>,
    asked_path: DmaPath,
    /// Replaced as a whole, so that who goes through it keeps nobody from that: it shows him all windows
    /// that have a page of the ranges that he holds, since those come and go with theirs locked.
    list: Mutex<Arc<[Arc<Window>]>>,
    /// How many there are: who has a range locked need not look for those of its pages if there are none.
    count: AtomicUsize,
    pub(super) unhealed: Unhealed,
}

impl WindowSet {
    pub(super) fn new(core: &Arc<Core>, releaser: &Arc<Releaser>, path: DmaPath) -> Arc<Self> {
        Arc::new(Self {
            core: core.clone(),
            releaser: releaser.clone(),
            asked_path: path,
            list: Mutex::new(Arc::new([])),
            count: AtomicUsize::new(0),
            unhealed: Unhealed::default(),
        })
    }

    pub(super) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// The windows of this moment. Who is the last to have one that has been closed meanwhile ends it.
    pub(super) fn all(&self) -> Arc<[Arc<Window>]> {
        self.list().clone()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    pub(super) fn has(&self, window: &Arc<Window>) -> bool {
        self.all().iter().any(|w| Arc::ptr_eq(w, window))
    }

    /// How windows name memory: what one has found out holds for all, since it is the same file.
    pub(super) fn path(&self) -> DmaPath {
        let windows = self.all();
        let mut paths = windows.iter().map(|window| window.path());
        let found = paths.find(|&path| path != DmaPath::Auto);
        found.unwrap_or(self.asked_path)
    }

    /// Whether any window maps a page of `span`, or may.
    pub(super) fn maps(&self, span: Span<Offset>) -> bool {
        !self.is_empty() && self.all().iter().any(|window| window.maps(span))
    }

    /// Whether some window pins every page of `span` that it maps: then mapping it allocates.
    pub(super) fn pins(&self, span: Span<Offset>) -> bool {
        !self.is_empty() && self.all().iter().any(|window| window.pins(span))
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Window>>)) {
        let mut list = self.list();
        let mut changed = list.to_vec();
        change(&mut changed);
        self.count.store(changed.len(), Ordering::Release);
        // Ended after the lock, should it be the last of some window.
        let before = std::mem::replace(&mut *list, changed.into());
        drop(list);
        drop(before);
    }

    fn list(&self) -> MutexGuard<'_, Arc<[Arc<Window>]>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Windows that come, change and go.
impl WindowSet {
    /// Adds one, which shows all that it may, or nothing is left of it; should the kernel refuse even that, it
    /// is [abandoned](Window::abandon).
    pub(super) fn open(
        &self,
        iommufd: BorrowedFd,
        config: &WindowConfig,
        span: Span<Offset>,
    ) -> Result<Arc<Window>> {
        let core = &self.core;
        let parts = WindowParts {
            kernel: core.machine.kernel().clone(),
            planes: core.planes.clone(),
            counters: core.counters.clone(),
            confidential: core.confidential,
            split: core.dma_split,
            path: self.path(),
            number: core.machine.number(),
            name: core.name.clone(),
        };
        let window =
            Window::new(parts, iommufd, config).map_err(|error| self.explain_call(error))?;
        let shown = self.undisputed_runs(span);
        // Else the guest's first conversions would find out, or nobody: a window whose IOAS is gone ends by itself.
        window.check_ioas().map_err(|error| self.explain(error))?;
        let window = Arc::new(window);
        // Here rather than when something goes wrong, on the thread of a vCPU whose place and priority it would have.
        core.machine.upkeep.start();
        // Listed before anything is mapped: whatever goes wrong, conversions find what is left.
        self.change(|windows| windows.push(window.clone()));
        for run in shown {
            let admitted = self.with_neighbours(|neighbours| window.admit(run, neighbours));
            if let Err(error) = admitted {
                self.close(&window).unwrap_or_else(|error| {
                    limited!(error, "{}: {error}", core.name);
                    self.abandon(&window);
                });
                return Err(self.explain(error));
            }
        }
        Ok(window)
    }

    /// Nobody has a window of the list any more: it is closed [from time to time](super::heal::Healer).
    pub(super) fn abandon(&self, window: &Window) {
        window.abandon();
        self.core.machine.upkeep.start();
    }

    /// Whether there are such.
    pub(super) fn has_abandoned(&self) -> bool {
        !self.is_empty() && self.all().iter().any(|window| window.is_abandoned())
    }

    /// Closes a window of the list. If areas of it are left, so is the window: conversions to
    /// private go on having to take their pages out of it first.
    pub(super) fn close(&self, window: &Arc<Window>) -> Result<()> {
        window.close()?;
        self.change(|windows| windows.retain(|w| !Arc::ptr_eq(w, window)));
        Ok(())
    }

    /// Makes a window show another part of the block. `within` says which parts of a range the caller has
    /// locked: all that comes or goes.
    pub(super) fn reshape(
        &self,
        window: &Window,
        config: &WindowConfig,
        new: Span<Offset>,
        within: impl Fn(Span<Offset>) -> Spans<Offset>,
    ) -> Result<()> {
        let shared = within(new).into_iter();
        let shared: Spans<Offset> = shared
            .flat_map(|part| self.runs_for(window, part))
            .collect();
        let reshaped =
            self.with_neighbours(|neighbours| window.reshape(config, &shared, neighbours));
        reshaped.map_err(|error| {
            let shown = within(window.span()).into_iter();
            shown.for_each(|part| self.mend(window, part));
            self.explain(error)
        })
    }

    /// Puts back what a window lost of `span` when it could not be reshaped, or quarantines that.
    fn mend(&self, window: &Window, span: Span<Offset>) {
        let runs = self.admissible_runs(span).into_iter();
        for run in runs.flat_map(|run| run.pieces(PIECE)) {
            for part in window.missing(run) {
                let admitted = self.with_neighbours(|neighbours| window.admit(part, neighbours));
                if let Err(error) = admitted {
                    limited!(error, "{}: {error}", self.core.name);
                    self.quarantine(part);
                }
            }
        }
    }

    /// Adds to an error of mapping what its user can do about it.
    fn explain(&self, error: Error) -> Error {
        let by_fd = (self.asked_path, self.core.backing()) == (DmaPath::Fd, Backing::InPlace);
        match error.cause() {
            Cause::Call(call) if call.errno == libc::EINVAL && by_fd => {
                Error::unsupported("this kernel can't map an in-place block for devices by fd")
                    .of(&self.core.name)
                    .because(error)
                    .with_remedy("leave dma=auto")
            }
            _ => self.explain_call(error),
        }
    }

    /// The same, of one of nothing of the block's.
    fn explain_call(&self, error: Error) -> Error {
        let explained = match error.cause() {
            Cause::Call(call) if call.errno == libc::ENOMEM => {
                error.with_remedy("pinned memory counts against RLIMIT_MEMLOCK: see ulimit -l")
            }
            _ => error.of_iommufd(),
        };
        explained.of(&self.core.name)
    }
}

/// Pages that come and go.
impl WindowSet {
    /// Takes `span` out of every window. Every one is tried.
    pub(crate) fn withdraw(&self, span: Span<Offset>) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let mut result = Ok(());
        for window in self.all().iter() {
            let withdrawn = self.with_neighbours(|neighbours| window.withdraw(span, neighbours));
            result = result.and(withdrawn.map_err(|error| self.explain(error)));
        }
        result
    }

    /// Puts what devices may reach of `span`, whose pages are shared, back into every window. Every window
    /// is tried.
    pub(crate) fn admit(&self, span: Span<Offset>) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let windows = self.all();
        let mut result = Ok(());
        for part in self.dma_parts(span) {
            for window in windows.iter() {
                let machine = &self.core.machine;
                let admitted = machine
                    .relieved(|| self.with_neighbours(|neighbours| window.admit(part, neighbours)));
                result = result.and(admitted.map_err(|error| self.explain(error)));
            }
        }
        result
    }

    /// Puts all of `span` that devices may reach back into every window. What can't be is quarantined.
    pub(crate) fn readmit(&self, span: Span<Offset>) {
        if let Err(error) = self.try_readmit(span) {
            limited!(error, "{error}");
        }
    }

    /// The same, for who can say that something is quarantined. Every run is tried, in pieces: one that
    /// can't be mapped keeps no other from devices.
    pub(super) fn try_readmit(&self, span: Span<Offset>) -> Result<()> {
        let mut result = Ok(());
        let runs = self.admissible_runs(span).into_iter();
        for run in runs.flat_map(|run| run.pieces(PIECE)) {
            let admitted = self.admit(run);
            match &admitted {
                // Of an ordinary block it may be what some window lacked.
                Ok(()) if self.core.quarantine.touches(run) => {
                    self.core.quarantine.lift(run);
                    self.core.counters.heals.add(1);
                }
                Ok(()) => {}
                Err(_) => self.quarantine(run),
            }
            result = result.and(admitted);
        }
        result
    }

    /// Nobody may reach `span` by DMA until it converts or is [healed](WindowSet::heal): an undo failed.
    /// Where the kernel refuses even to unmap, the span can't become private either, since that too
    /// unmaps it first. What it takes along of its unit is quarantined as well.
    ///
    /// In an ordinary VM, whose pages are never to be kept from devices, it is what some window lacks;
    /// others keep it.
    pub(crate) fn quarantine(&self, span: Span<Offset>) {
        let core = &self.core;
        let voices = &core.machine.voices;
        let mut spans = vec![span];
        while let Some(span) = spans.pop() {
            let is_new = core.quarantine.insert(span);
            if !is_new && !core.confidential {
                return;
            }
            core.counters.quarantines.add(1);
            core.machine.upkeep.start();
            voices.say(module_path!(), Class::Quarantine, || {
                let reach = match core.confidential {
                    true => "no device reaches it until it converts again or heals",
                    false => "a device does not reach it until it heals",
                };
                format!("{}: {span} is quarantined: {reach}, which is tried once a minute at least, and in a reset", core.name)
            });
            if !core.confidential {
                return;
            }
            for window in self.all().iter() {
                let admissible = |span| self.admissible_runs(span);
                let (withdrawn, taken) =
                    Neighbours::during(&admissible, |neighbours| window.withdraw(span, neighbours));
                if let Err(error) = withdrawn {
                    voices.say(module_path!(), Class::Quarantine, || {
                        format!("{}: but for one DMA window: {error}", core.name)
                    });
                }
                let Taken { lost, left } = taken;
                left.into_iter().for_each(|left| self.note_what_left(left));
                let lost = lost.into_iter();
                spans.extend(lost.flat_map(|lost| core.quarantine.outside(lost)));
            }
        }
    }

    /// Has windows change, and notes what became of neighbours: those that are lost are quarantined.
    fn with_neighbours<T>(&self, change: impl FnOnce(&mut Neighbours) -> T) -> T {
        let admissible = |span| self.admissible_runs(span);
        let (changed, taken) = Neighbours::during(&admissible, change);
        let Taken { lost, left } = taken;
        lost.into_iter().for_each(|span| self.quarantine(span));
        left.into_iter().for_each(|span| self.note_what_left(span));
        changed
    }

    /// Pages of `span` that no device was to have have left with others: of private ones nothing is wrong
    /// any more.
    fn note_what_left(&self, span: Span<Offset>) {
        for part in self.core.quarantine.inside(span) {
            let private = self.core.pages.attributes().runs(part, Attribute::Private);
            for run in private {
                if !self.maps(run) {
                    self.private_has_left(run);
                }
            }
        }
    }

    /// No device has any of `run`, all of which is private, any more.
    fn private_has_left(&self, run: Span<Offset>) {
        self.core.quarantine.lift(run);
        let unused = self.releaser.releasable(run, Attribute::Shared);
        self.releaser.release(unused, Attribute::Shared);
    }
}

/// What devices may reach.
impl WindowSet {
    /// The parts of `span` that devices may reach: shared, not poisoned, and in a VM with private pages not
    /// quarantined. In an ordinary one that keeps nothing from a window that can have it.
    pub(crate) fn admissible_runs(&self, span: Span<Offset>) -> Spans<Offset> {
        if self.core.machine.is_detached() {
            return Spans::new();
        }
        let shared = self.core.pages.attributes().runs(span, Attribute::Shared);
        shared
            .into_iter()
            .flat_map(|run| self.dma_parts(run))
            .collect()
    }

    /// The parts of `span` that devices may reach if it is shared.
    fn dma_parts(&self, span: Span<Offset>) -> Spans<Offset> {
        let core = &self.core;
        if core.has_nothing_wrong() {
            return Spans::from_elem(span, 1);
        }
        if !core.confidential {
            return core.pages.sound_parts(span);
        }
        let parts = core.quarantine.outside(span).into_iter();
        parts
            .flat_map(|part| core.pages.sound_parts(part))
            .collect()
    }

    /// The parts of `span` that devices may reach, and that no window is known to be refused.
    fn undisputed_runs(&self, span: Span<Offset>) -> Spans<Offset> {
        let runs = self.admissible_runs(span).into_iter();
        runs.flat_map(|run| self.core.quarantine.outside(run))
            .collect()
    }

    /// What a window is to show of `span`: all that is undisputed, and what it has although others lack
    /// it.
    fn runs_for(&self, window: &Window, span: Span<Offset>) -> Spans<Offset> {
        let mut runs = RunSet::of(&self.undisputed_runs(span));
        let admissible = self.admissible_runs(span).into_iter();
        let shown = admissible.flat_map(|run| window.shown(run));
        shown.for_each(|run| runs.insert(run));
        runs.inside(span)
    }
}

/// How what went wrong is put right.
impl WindowSet {
    /// Ends what is wrong with those pages of `span` that have `attribute` and are quarantined: devices
    /// get shared ones, and lose what they may still have behind private ones. Every run of them is
    /// tried; one that the kernel still refuses stays quarantined.
    pub(super) fn heal(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        let core = &self.core;
        // At the end of the VM pages are shared that no guest has shown.
        if !core.quarantine.touches(span) || core.machine.check_attached().is_err() {
            return Ok(());
        }
        let mut result = Ok(());
        for part in core.quarantine.inside(span) {
            let runs = core.pages.attributes().runs(part, attribute);
            for run in runs {
                result = result.and(match attribute {
                    Attribute::Shared => self.heal_shared(run),
                    Attribute::Private => self.withdraw(run).map(|()| self.private_has_left(run)),
                });
            }
        }
        if !core.quarantine.touches(span) {
            core.counters.heals.add(1);
        }
        result
    }

    /// Both kinds, for who has no error to give.
    pub(super) fn try_to_heal(&self, span: Span<Offset>) {
        for attribute in [Attribute::Private, Attribute::Shared] {
            if let Err(error) = self.heal(span, attribute) {
                limited!(error, "{error}");
            }
        }
    }

    /// Pages of `span` are lost that could not be taken out of all windows when that was found.
    fn take_lost_out(&self, span: Span<Offset>) -> Result<()> {
        let mut lost = RunSet::of(&[span]);
        let sound = self.core.pages.sound_parts(span);
        sound.iter().for_each(|&part| lost.remove(part));
        let mut lost = lost.inside(span).into_iter();
        lost.try_for_each(|part| match self.maps(part) {
            true => self.leave_lost(part),
            false => Ok(()),
        })
    }

    /// Takes `lost` pages out of all windows, and puts back what has to leave with them: of an ordinary block,
    /// the pieces that windows are mapped in.
    pub(super) fn leave_lost(&self, lost: Span<Offset>) -> Result<()> {
        let core = &self.core;
        let gone = core.going_with(lost);
        let withdrawn = self.withdraw(gone);
        let put_back = self.try_readmit(core.lock_hull(gone));
        withdrawn.and(put_back)
    }

    /// Lost pages could not be taken out of all windows: it is tried again.
    pub(super) fn quarantine_lost(&self, lost: Span<Offset>) {
        let core = &self.core;
        let mut left = RunSet::default();
        for window in self.all().iter() {
            let shown = window.shown(lost).into_iter();
            shown.for_each(|part| left.insert(part));
        }
        let mut is_new = false;
        for part in left.inside(lost) {
            is_new |= core.quarantine.insert(part);
        }
        if !is_new {
            return;
        }
        core.counters.quarantines.add(1);
        core.machine.upkeep.start();
        core.machine.voices.say(module_path!(), Class::Quarantine, || {
            format!(
                "{}: devices may still reach some of {lost}, whose memory is lost: to take it out is tried once a \
                 minute at least, and in a reset",
                core.name
            )
        });
    }

    /// Devices get all of `run`, or of a piece of it nothing: then that stays quarantined.
    fn heal_shared(&self, run: Span<Offset>) -> Result<()> {
        let windows = self.all();
        let mut result = Ok(());
        for piece in run.pieces(PIECE) {
            let mut admitted = self.take_lost_out(piece);
            for part in self.core.pages.sound_parts(piece) {
                for window in windows.iter() {
                    let shown = self.with_neighbours(|neighbours| window.admit(part, neighbours));
                    admitted = admitted.and(shown.map_err(|error| self.explain(error)));
                }
            }
            match &admitted {
                Ok(()) => self.core.quarantine.lift(piece),
                // In an ordinary VM no page is kept from the devices that can have it.
                Err(_) if !self.core.confidential => {}
                Err(_) => {
                    if let Err(error) = self.withdraw(piece) {
                        limited!(error, "{error}");
                    }
                }
            }
            result = result.and(admitted);
        }
        result
    }
}
