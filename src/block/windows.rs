// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which devices reach what of a block: its windows, and what is kept from all of them.

use super::Block;
use crate::attributes::Attribute;
use crate::dma::{DmaPath, Neighbours, Window, WindowConfig, PIECE};
use crate::error::{Cause, Error, Result};
use crate::plane::Backing;
use crate::range_locks::RangeGuard;
use crate::run_set::{RunSet, Spans};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, MutexGuard, PoisonError};
use crate::throttle::{limited, Class};
use crate::units::{Offset, Span, PAGE_SIZE};

impl Block {
    /// Shows a part of the block to the devices of an IOAS: all of its shared pages now, and from
    /// now on whatever becomes shared. Waits for conversions of that part.
    ///
    /// # Errors
    /// EINVAL for a range that isn't in the block; ENOENT if there is no such IOAS, ENOTTY if `iommufd`
    /// is none; EEXIST if the IOAS has something there; ENOTSUP if `dma` or `dma-split` insists on a way
    /// that the kernel refuses, or the memory is out of the direct map; ENOMEM when pages can't be pinned
    /// (RLIMIT_MEMLOCK counts them). Nothing is mapped then. Should the kernel refuse even to take back
    /// what was mapped, those pages can't become private, and the next window and
    /// [`Block::check_unused`] try again.
    pub fn add_window(self: &Arc<Self>, config: &WindowConfig) -> Result<Arc<Window>> {
        if !self.planes.is_in_direct_map() {
            return Err(Error::Unsupported(format!(
                "{}: direct-map=off: the kernel lets nobody pin such memory, so no passed-through \
                 device can reach it; leave direct-map on, or use a device that copies (virtio, \
                 vhost-user)",
                self.name
            )));
        }
        let parts = crate::dma::WindowParts {
            kernel: self.vm.kernel().clone(),
            planes: self.planes.clone(),
            counters: self.counters.clone(),
            confidential: self.confidential,
            split: self.dma_split,
            // What an earlier window found out holds for this one: it is the same file.
            path: self.dma_path(),
            number: self.vm.number_block(),
        };
        let span = config.span_in(self.span)?;
        // One that could not be made may be where this one is to be.
        if let Err(error) = self.close_abandoned() {
            limited!(warn, "{error}");
        }
        let _range = self.vm.ranges.lock((self.number, self.lock_hull(span)));
        let window = Window::new(parts, config).map_err(|error| match error.errno() {
            libc::ENOMEM => self.explain(error),
            _ => error,
        })?;
        let shown = self.undisputed_runs(span);
        // Else the guest's first conversions would find out, or nobody: a window whose IOAS is gone ends by itself.
        window.check_ioas().map_err(|error| self.explain(error))?;
        let window = Arc::new(window);
        // Here rather than when something goes wrong, on the thread of a vCPU whose place and priority it would have.
        self.vm.upkeep.start();
        // Listed before anything is mapped: whatever goes wrong, conversions find what is left.
        self.change_windows(|windows| windows.push(window.clone()));
        for run in shown {
            let admitted = self.with_neighbours(|neighbours| window.admit(run, neighbours));
            if let Err(error) = admitted {
                self.close_window(&window).unwrap_or_else(|error| {
                    limited!(error, "{}: {error}", self.name);
                    window.abandon();
                });
                return Err(self.explain(error));
            }
        }
        // Whatever kept devices from it may be over.
        self.try_to_heal(span);
        Ok(window)
    }

    /// Closes windows that could not be made and were not to be closed then.
    pub(super) fn close_abandoned(&self) -> Result<()> {
        let windows = self.windows();
        let mut result = Ok(());
        for window in windows.iter().filter(|window| window.is_abandoned()) {
            let _range = self.lock_shown(window);
            let closed = self.close_window(window).map_err(|error| {
                Error::Busy(format!(
                    "{}: a DMA window that could not be made is still there: {error}",
                    self.name
                ))
            });
            result = result.and(closed);
        }
        result
    }

    /// Makes a window show another part of the block, as when a guest's address map changes around
    /// it. What both parts have in common stays mapped all the time and costs nothing, except where
    /// it is one kernel area with what goes. `config` names the same IOAS and access, and the same
    /// IOVA for each offset. Waits for conversions of what comes and what goes, and for who changes
    /// the same window.
    ///
    /// # Errors
    /// EINVAL if it isn't a window of this block, or `config` differs in more than the range; else as
    /// [`Block::add_window`]. The window shows what it showed before, or, if the kernel refused to
    /// unmap, both parts. What it can't show again is quarantined, until it converts, is asked for, a
    /// window comes, goes or is reshaped there, or the block is reset.
    pub fn reshape_window(&self, window: &Arc<Window>, config: &WindowConfig) -> Result<()> {
        let new = config.span_in(self.span)?;
        let old = self.reshape_locked(window, config, new)?;
        // Whatever kept devices from it may be over.
        self.lock_and_heal_in(old, None);
        self.lock_and_heal_in(new, None);
        Ok(())
    }

    /// Answers what the window showed before.
    fn reshape_locked(
        &self,
        window: &Arc<Window>,
        config: &WindowConfig,
        new: Span<Offset>,
    ) -> Result<Span<Offset>> {
        let difference = |old: Span<Offset>| {
            let mut hulls = RunSet::default();
            for (one, other) in [(old, new), (new, old)] {
                let mut beyond = RunSet::of(&[one]);
                beyond.remove(other);
                for part in beyond.inside(one) {
                    hulls.insert(self.lock_hull(part));
                }
            }
            hulls.inside(self.span)
        };
        let _range = self.lock_window(window, difference);
        if !self.windows().iter().any(|w| Arc::ptr_eq(w, window)) {
            return Err(self.no_such_window());
        }
        let old = window.span();
        // Areas that are in one with what goes lie in these, too.
        let locked = difference(old);
        let within = |span: Span<Offset>| {
            let parts = locked
                .iter()
                .filter_map(move |part| part.intersection(&span));
            parts.collect::<Spans<Offset>>()
        };
        let shared = within(new).into_iter();
        let shared: Spans<Offset> = shared
            .flat_map(|part| self.runs_for(window, part))
            .collect();
        let reshaped =
            self.with_neighbours(|neighbours| window.reshape(config, &shared, neighbours));
        reshaped.map(|()| old).map_err(|error| {
            let shown = within(window.span());
            shown.into_iter().for_each(|part| self.mend(window, part));
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
                    limited!(error, "{}: {error}", self.name);
                    self.quarantine_span(part);
                }
            }
        }
    }

    /// Locks a window against who else changes it, and with it those `pages` that depend on what it shows.
    fn lock_window(
        &self,
        window: &Window,
        pages: impl Fn(Span<Offset>) -> Spans<Offset>,
    ) -> RangeGuard<'_> {
        loop {
            let shown = window.span();
            let mut ranges = vec![(window.number(), Span::between(0, PAGE_SIZE))];
            ranges.extend(pages(shown).into_iter().map(|span| (self.number, span)));
            let guard = self.vm.ranges.lock(ranges);
            // Waiting, it may have been reshaped.
            if window.span() == shown {
                return guard;
            }
        }
    }

    /// The same, with all that it shows.
    fn lock_shown(&self, window: &Window) -> RangeGuard<'_> {
        // What is quarantined leaves other windows, too, with its unit.
        self.lock_window(window, |shown| Spans::from_elem(self.lock_hull(shown), 1))
    }

    /// Closes a window of the list. If areas of it are left, so is the window: conversions to
    /// private go on having to take their pages out of it first. The caller holds its range.
    pub(super) fn close_window(&self, window: &Arc<Window>) -> Result<()> {
        window.close()?;
        self.change_windows(|windows| windows.retain(|w| !Arc::ptr_eq(w, window)));
        Ok(())
    }

    /// Ends a window: devices reach nothing through it any more. Waits for conversions of its part.
    ///
    /// # Errors
    /// EINVAL if it isn't a window of this block. The kernel's errno if it refused to unmap: the
    /// window stays, takes nothing in any more, and its pages can't become private until they are
    /// out of it. Try again once whoever holds them in the IOAS is gone.
    pub fn remove_window(&self, window: &Arc<Window>) -> Result<()> {
        let _range = self.lock_shown(window);
        if !self.windows().iter().any(|w| Arc::ptr_eq(w, window)) {
            return Err(self.no_such_window());
        }
        self.close_window(window)?;
        // It may have been the one that refused what others can have.
        self.try_to_heal(window.span());
        Ok(())
    }
}

/// For conversions.
impl Block {
    /// Takes `span` out of every window. Every one is tried.
    pub(crate) fn withdraw(&self, span: Span<Offset>) -> Result<()> {
        if self.has_no_window() {
            return Ok(());
        }
        let mut result = Ok(());
        let mut left = Vec::new();
        for window in self.windows().iter() {
            let withdrawn = self.with_neighbours(|neighbours| {
                let withdrawn = window.withdraw(span, neighbours);
                left.append(&mut neighbours.left);
                withdrawn
            });
            result = result.and(withdrawn.map_err(|error| self.explain(error)));
        }
        for span in left {
            self.note_what_left(span);
        }
        result
    }

    /// Has windows change, and quarantines the neighbours that are lost. The caller holds the hull.
    pub(super) fn with_neighbours<T>(&self, change: impl FnOnce(&mut Neighbours) -> T) -> T {
        let admissible = |span| self.admissible_runs(span);
        let mut neighbours = Neighbours::new(&admissible);
        let changed = change(&mut neighbours);
        for span in neighbours.lost {
            self.quarantine_span(span);
        }
        changed
    }

    /// Pages of `span` that no device was to have have left with others: of private ones nothing is wrong
    /// any more.
    fn note_what_left(&self, span: Span<Offset>) {
        for part in self.quarantined_in(span) {
            let private = self.attributes().runs(part, Attribute::Private);
            for run in private {
                if !self.windows().iter().any(|window| window.maps(run)) {
                    self.private_has_left(run);
                }
            }
        }
    }

    /// Whether some window pins every page of `span` that it maps: then mapping it allocates.
    pub(crate) fn pins(&self, span: Span<Offset>) -> bool {
        !self.has_no_window() && self.windows().iter().any(|window| window.pins(span))
    }

    /// Puts what devices may reach of `span`, whose pages are shared, back into every window. Every window
    /// is tried.
    pub(crate) fn admit(&self, span: Span<Offset>) -> Result<()> {
        if self.has_no_window() {
            return Ok(());
        }
        let windows = self.windows();
        let mut result = Ok(());
        for part in self.dma_parts(span) {
            for window in windows.iter() {
                let admitted = self
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
    pub(crate) fn try_readmit(&self, span: Span<Offset>) -> Result<()> {
        let mut result = Ok(());
        let runs = self.admissible_runs(span).into_iter();
        for run in runs.flat_map(|run| run.pieces(PIECE)) {
            let admitted = self.admit(run);
            match &admitted {
                // Of an ordinary block it may be what some window lacked.
                Ok(()) if self.is_quarantined(run) => {
                    self.lift_quarantine(run);
                    self.counters.heals.add(1);
                }
                Ok(()) => {}
                Err(_) => self.quarantine_span(run),
            }
            result = result.and(admitted);
        }
        result
    }

    /// Nobody may reach `span` by DMA until it converts or is [healed](Block::heal): an undo failed.
    /// Where the kernel refuses even to unmap, the span can't become private either, since that too
    /// unmaps it first. What it takes along of its unit is quarantined as well.
    ///
    /// In an ordinary VM, whose pages are never to be kept from devices, it is what some window lacks;
    /// others keep it.
    pub(crate) fn quarantine_span(&self, span: Span<Offset>) {
        let mut spans = vec![span];
        while let Some(span) = spans.pop() {
            let known = self.change_quarantine(|quarantine| {
                let known = quarantine.outside(span).is_empty();
                quarantine.insert(span);
                known
            });
            if known && !self.confidential {
                return;
            }
            self.counters.quarantines.add(1);
            self.vm.upkeep.start();
            self.vm.voices.say(Class::Quarantine, || {
                let reach = match self.confidential {
                    true => "no device reaches it until it converts again or heals",
                    false => "a device does not reach it until it heals",
                };
                format!("{}: {span} is quarantined: {reach}, which is tried once a minute at least, and in a reset", self.name)
            });
            if !self.confidential {
                return;
            }
            for window in self.windows().iter() {
                let admissible = |span| self.admissible_runs(span);
                let mut neighbours = Neighbours::new(&admissible);
                if let Err(error) = window.withdraw(span, &mut neighbours) {
                    self.vm.voices.say(Class::Quarantine, || {
                        format!("{}: but for one DMA window: {error}", self.name)
                    });
                }
                let known = self.quarantine();
                let lost = neighbours.lost.into_iter();
                spans.extend(lost.flat_map(|lost| known.outside(lost)));
            }
        }
    }

    /// Whether a page of `span` is quarantined.
    pub(crate) fn is_quarantined(&self, span: Span<Offset>) -> bool {
        self.quarantined.load(Ordering::Acquire) != 0 && self.quarantine().touches(span)
    }

    /// Whether nothing is wrong with any page of `span`.
    pub(crate) fn is_plain(&self, span: Span<Offset>) -> bool {
        !self.is_poisoned() && !self.is_quarantined(span)
    }

    pub(crate) fn quarantined_in(&self, span: Span<Offset>) -> Spans<Offset> {
        self.quarantine().inside(span)
    }

    /// `span` has converted: what was wrong with it is over.
    pub(crate) fn lift_quarantine(&self, span: Span<Offset>) {
        if self.quarantined.load(Ordering::Acquire) != 0 {
            self.change_quarantine(|quarantine| quarantine.remove(span));
        }
    }

    fn change_quarantine<T>(&self, change: impl FnOnce(&mut RunSet) -> T) -> T {
        let mut quarantine = self.quarantine();
        let changed = change(&mut quarantine);
        self.quarantined
            .store(quarantine.bytes(), Ordering::Release);
        changed
    }

    /// The parts of `span` that are not poisoned as shared pages.
    pub(super) fn sound_parts(&self, span: Span<Offset>) -> Spans<Offset> {
        match self.poisoned.bytes() {
            0 => Spans::from_elem(span, 1),
            _ => self.poisoned.outside(span, Attribute::Shared),
        }
    }

    /// The parts of `span` that devices may reach if it is shared.
    fn dma_parts(&self, span: Span<Offset>) -> Spans<Offset> {
        if self.has_nothing_wrong() {
            return Spans::from_elem(span, 1);
        }
        if !self.confidential {
            return self.sound_parts(span);
        }
        let parts = self.quarantine().outside(span).into_iter();
        parts.flat_map(|part| self.sound_parts(part)).collect()
    }

    /// The parts of `span` that devices may reach, and that no window is known to be refused.
    fn undisputed_runs(&self, span: Span<Offset>) -> Spans<Offset> {
        let runs = self.admissible_runs(span).into_iter();
        let quarantine = self.quarantine();
        runs.flat_map(|run| quarantine.outside(run)).collect()
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

    /// The parts of `span` that devices may reach: shared, not poisoned, and in a VM with private pages not
    /// quarantined. In an ordinary one that keeps nothing from a window that can have it.
    pub(crate) fn admissible_runs(&self, span: Span<Offset>) -> Spans<Offset> {
        if self.vm.is_detached() {
            return Spans::new();
        }
        let shared = self.attributes().runs(span, Attribute::Shared);
        shared
            .into_iter()
            .flat_map(|run| self.dma_parts(run))
            .collect()
    }
}

impl Block {
    pub(super) fn quarantine(&self) -> MutexGuard<'_, RunSet> {
        self.quarantine
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Its windows at this moment. Who is the last to have one that has been closed meanwhile ends it.
    pub(super) fn windows(&self) -> Arc<[Arc<Window>]> {
        self.windows_locked().clone()
    }

    fn has_no_window(&self) -> bool {
        self.window_count.load(Ordering::Acquire) == 0
    }

    fn change_windows(&self, change: impl FnOnce(&mut Vec<Arc<Window>>)) {
        let mut windows = self.windows_locked();
        let mut changed = windows.to_vec();
        change(&mut changed);
        self.window_count.store(changed.len(), Ordering::Release);
        // Ended after the lock, should it be the last of some window.
        let before = std::mem::replace(&mut *windows, changed.into());
        drop(windows);
        drop(before);
    }

    fn windows_locked(&self) -> MutexGuard<'_, Arc<[Arc<Window>]>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn no_such_window(&self) -> Error {
        Error::Invalid(format!(
            "{}: that DMA window is not one of this block",
            self.name
        ))
    }

    /// Adds to an error of mapping what its user can do about it.
    pub(super) fn explain(&self, error: Error) -> Error {
        let errno = match error.cause() {
            Cause::Call(call) => call.errno,
            _ => return error,
        };
        let explained = match (errno, self.dma_path, self.backing()) {
            (libc::EINVAL, DmaPath::Fd, Backing::InPlace) => Error::unsupported(format!(
                "this kernel can't map a {} block for devices by fd",
                self.backing()
            ))
            .because(error)
            .with_remedy("leave dma=auto"),
            (libc::ENOMEM, ..) => {
                error.with_remedy("pinned memory counts against RLIMIT_MEMLOCK: see ulimit -l")
            }
            _ => error.of_iommufd(),
        };
        explained.of(&self.name)
    }
}
