// SPDX-License-Identifier: MIT OR Apache-2.0
//! The invariants of the library's front page, when no thread is at work.

use super::*;

/// How a block has kept what devices see.
#[derive(Default)]
struct Devices {
    /// Bytes that they find, in all windows together.
    found: u64,
    /// Pages that one lacks though it is shared, or has though it is private.
    wrong: u64,
}

impl Rig {
    /// Whether failing calls may have left something, which then is quarantined.
    fn is_scarred(&self) -> bool {
        self.setup.failures.is_some()
    }

    /// What holds after any schedule.
    pub fn check(&self) {
        self.check_now(self.is_scarred());
    }

    fn check_now(&self, scarred: bool) {
        self.check_violations();
        for number in 0..BLOCKS {
            match self.is_detached() {
                true => self.check_hidden(number),
                false => self.check_block(number, scarred),
            }
        }
    }

    /// Whether the VM could not be made anew.
    fn is_detached(&self) -> bool {
        let slot = self.blocks[0].memslot(0);
        slot.is_err() && !self.ended.load(Ordering::SeqCst)
    }

    /// Nobody reaches a block of a VM that has no file.
    fn check_hidden(&self, number: usize) {
        let block = &self.blocks[number];
        let denied = block.check_access(0, PAGE).map_err(|error| error.errno());
        assert_eq!(denied, Err(libc::EBUSY));
        let stats = block.stats();
        assert_eq!((stats.bindings, stats.bytes_poisoned), (0, 0));
        assert!(self.is_scarred() || stats.bytes_dma_mapped == 0);
    }

    /// What the kernel has noticed on the way.
    fn check_violations(&self) {
        let mut violations = self.kernel.violations();
        if self.setup.resets {
            violations.retain(|text| !text.contains("lost its bytes"));
        }
        assert_eq!(violations, Vec::<String>::new());
    }

    /// Whether a page is shared, and its memory is lost.
    fn is_poisoned(&self, number: usize, offset: u64) -> bool {
        let access = self.blocks[number].check_access(offset, PAGE);
        access.is_err_and(|error| error.errno() == libc::EIO)
    }

    fn check_block(&self, number: usize, scarred: bool) {
        let block = &self.blocks[number];
        let windows: Vec<_> = locked(&self.windows)
            .iter()
            .filter(|shown| shown.block == number)
            .cloned()
            .collect();
        let mut devices = Devices::default();
        let (mut private_pages, mut double) = (0, 0);
        for page in 0..self.setup.pages {
            let offset = page * self.setup.grain;
            let (attribute, _) = block.run_at(offset).unwrap();
            let private = attribute == Attribute::Private;
            private_pages += u64::from(private);
            self.check_told(number, offset, private);
            double += u64::from(self.is_double(number, offset, private));
            let poisoned = self.is_poisoned(number, offset);
            let reachable = !private && !poisoned;
            let mut wrong = false;
            for shown in &windows {
                let span = shown.window.span();
                let inside = (span.first()..span.end()).contains(&offset);
                let iova = self.iova(number, offset);
                let file = block.file(Attribute::Shared);
                let seen = self.kernel.device_sees(shown.ioas_id, file, iova);
                assert!(
                    seen.is_none_or(|seen| seen == offset),
                    "{seen:?} at {offset:#x}"
                );
                devices.found += u64::from(seen.is_some()) * self.setup.grain;
                let expected = reachable && inside && !shown.closing;
                // What is shown beyond its span could not be unmapped, and can't become private.
                let beyond = scarred && !private && (!inside || shown.closing);
                wrong |= seen.is_some() != expected && !beyond;
            }
            devices.wrong += u64::from(wrong);
            let exact = scarred || !wrong;
            assert!(
                exact,
                "block {number}, page {page}, {attribute:?}, poisoned: {poisoned}: {}",
                self.seen(number, offset, &windows)
            );
        }
        let stats = block.stats();
        // Of memory that could not be mapped again nobody is told which pages are poisoned.
        let closed = block.check_access(0, PAGE);
        let untold = match closed.is_err_and(|error| error.errno() == libc::EBUSY) {
            true => stats.bytes_poisoned,
            false => 0,
        };
        assert_eq!(stats.bytes_private, private_pages * self.setup.grain);
        assert!(
            devices.wrong * self.setup.grain <= stats.bytes_quarantined + untold,
            "block {number}: {} pages are wrong, {:#x} bytes quarantined",
            devices.wrong,
            stats.bytes_quarantined
        );
        // What devices may still have can't be freed, nor can what is in a huge page with it.
        let most = self.setup.huge_page() / self.setup.grain;
        let counted = stats.double_bytes + most * stats.bytes_quarantined;
        assert!(
            double * self.setup.grain <= counted || stats.release_failures != 0,
            "block {number}: {double} pages are double, {stats:?}"
        );
        if !scarred {
            assert_eq!(stats.bytes_quarantined, 0);
            assert_eq!(stats.bytes_dma_mapped, devices.found);
            assert_eq!(stats.windows, windows.len() as u64);
        }
        let bound = locked(&self.bound);
        let bound = bound.values().filter(|&&of| of == number).count() as u64;
        assert_eq!(stats.bindings, bound);
    }

    fn seen(&self, number: usize, offset: u64, windows: &[Shown]) -> String {
        let seen = windows.iter().map(|shown| {
            let file = self.blocks[number].file(Attribute::Shared);
            let seen = self
                .kernel
                .device_sees(shown.ioas_id, file, self.iova(number, offset));
            format!(
                "IOAS {} shows {} and has {seen:?}",
                shown.ioas_id,
                shown.window.span()
            )
        });
        seen.collect::<Vec<_>>().join(", ")
    }

    /// The kernel knows the attribute that the library knows.
    fn check_told(&self, number: usize, offset: u64, private: bool) {
        let block = &self.blocks[number];
        match self.setup.vm {
            Backing::Ordinary => assert!(!private),
            Backing::InPlace => {
                let file = block.file(Attribute::Private);
                // At its end a VM has no private page any more.
                let told = self.kernel.is_private_in(file, offset);
                let end = self.ended.load(Ordering::SeqCst);
                assert!(
                    told == private || end,
                    "offset {offset:#x} of block {number}"
                );
            }
            Backing::Split => {
                for (gpa, _) in locked(&self.bound).iter().filter(|(_, of)| **of == number) {
                    let told = self.kernel.is_private(Gpa(gpa + offset));
                    assert_eq!(told, private, "offset {offset:#x} of block {number}");
                }
            }
        }
    }

    /// Whether a page has memory in the plane that is not its own.
    fn is_double(&self, number: usize, offset: u64, private: bool) -> bool {
        let other = match private {
            true => Attribute::Shared,
            false => Attribute::Private,
        };
        let block = &self.blocks[number];
        // A huge page of the shared plane is there as long as a page of it is shared.
        let huge = self.setup.huge_page();
        let first = offset - offset % huge;
        let is_wanted = |at| block.run_at(at).unwrap().0 == Attribute::Shared;
        let mut pages = (first..first + huge).step_by(self.setup.grain as usize);
        if private && pages.any(is_wanted) {
            return false;
        }
        self.setup.vm == Backing::Split && self.kernel.has_memory(block.file(other), offset)
    }

    /// Whatever happened, the VM can be led back to where all holds, and to an end without remains.
    pub fn lead_back(self: Arc<Self>) {
        self.kernel.fail(None);
        if self.ended.load(Ordering::SeqCst) {
            return self.finish();
        }
        self.make_anew_what_lost_its_mapping();
        self.check_healing();
        let closing: Vec<_> = locked(&self.windows)
            .iter()
            .filter(|shown| shown.closing)
            .cloned()
            .collect();
        for shown in closing {
            self.remove_window(&shown).unwrap();
        }
        match self.vm.attach(&self.iommufd) {
            Ok(()) => {}
            Err(error) => assert_eq!(error.errno(), libc::EBUSY, "{error}"),
        }
        // A reset may lose what the guest has shared.
        self.remove_slots();
        let bound = locked(&self.bound).clone();
        for (gpa, number) in bound {
            self.unbind(number, gpa).unwrap();
        }
        for number in 0..BLOCKS {
            let block = &self.blocks[number];
            block.reset().unwrap();
            self.bind_home(number).unwrap();
            block.check_unused().unwrap_err();
            let initial = block.run_at(0).unwrap();
            assert_eq!(initial, (self.setup.initial, self.bytes()));
        }
        let both = [Attribute::Private, Attribute::Shared];
        let mut converted = 0;
        let attributes = match self.setup.vm {
            Backing::Ordinary => &both[1..],
            _ => &both,
        };
        // Twice: what could not be freed goes when the page converts the next time.
        for &attribute in attributes.iter().cycle().take(2 * attributes.len()) {
            let size = BLOCKS as u64 * self.bytes();
            self.vm.convert(HOME, size, attribute).unwrap();
            converted += 1;
            if converted > attributes.len() {
                self.check_devices_have_all(attribute);
            }
        }
        self.finish();
    }

    /// Addresses that could neither be hidden nor be shown again for a VM that was to be rebuilt have no
    /// memory, until the next time.
    fn make_anew_what_lost_its_mapping(&self) {
        let is_mapped = |block: &Arc<Block>| {
            let access = block.check_access(0, PAGE);
            let closed = access.is_err_and(|error| error.errno() == libc::EBUSY);
            !closed && self.kernel.mapped(block.host()).is_some()
        };
        if self.is_detached() || self.blocks.iter().all(is_mapped) {
            return;
        }
        self.remove_slots();
        self.vm.detach().unwrap();
        locked(&self.bound).clear();
        self.kernel.rebuild_vm();
    }

    /// What went wrong is put right in time, by nobody's doing.
    fn check_healing(&self) {
        // But for what a window has that is to be closed.
        let closing = self.windows().iter().any(|shown| shown.closing);
        if closing || self.is_detached() {
            return;
        }
        for block in &self.blocks {
            block.check_unused().unwrap_err();
        }
        (0..4).for_each(|_| self.let_time_pass());
        self.check_now(false);
    }

    fn check_devices_have_all(&self, attribute: Attribute) {
        self.check_violations();
        for shown in self.windows() {
            let block = &self.blocks[shown.block];
            let span = shown.window.span();
            let offsets = (span.first()..span.end()).step_by(self.setup.grain as usize);
            for offset in offsets {
                let file = block.file(Attribute::Shared);
                let iova = self.iova(shown.block, offset);
                let seen = self.kernel.device_sees(shown.ioas_id, file, iova);
                let expected = (attribute == Attribute::Shared).then_some(offset);
                assert_eq!(seen, expected, "after all, IOAS {}", shown.ioas_id);
                let private = attribute == Attribute::Private;
                self.check_told(shown.block, offset, private);
            }
        }
        for (number, block) in self.blocks.iter().enumerate() {
            // What is kept goes in time.
            (0..4).for_each(|_| self.let_time_pass());
            let stats = block.stats();
            let nothing = (
                stats.bytes_quarantined,
                stats.bytes_poisoned,
                stats.double_bytes,
            );
            assert_eq!(nothing, (0, 0, 0));
            for page in 0..self.setup.pages {
                let double = self.is_double(
                    number,
                    page * self.setup.grain,
                    attribute == Attribute::Private,
                );
                assert!(!double, "double memory: page {page} of block {number}");
            }
        }
    }

    /// Everything ends, and nothing is left of it.
    fn finish(self: Arc<Self>) {
        let Ok(rig) = Arc::try_unwrap(self) else {
            panic!("a thread has left something");
        };
        let kernel = rig.kernel.clone();
        for shown in rig.windows() {
            rig.remove_window(&shown).unwrap();
        }
        let bound = locked(&rig.bound).clone();
        for (gpa, number) in bound {
            rig.unbind(number, gpa).unwrap();
        }
        for block in &rig.blocks {
            block.check_unused().unwrap();
            assert_eq!(Arc::strong_count(block), 1);
        }
        for (number, ioas_id) in
            (0..=BLOCKS).flat_map(|number| (0..IOASES).map(move |id| (number, id)))
        {
            for page in 0..rig.setup.pages {
                let iova = rig.iova(number, page * rig.setup.grain);
                let mut files = rig.blocks.iter().map(|block| block.file(Attribute::Shared));
                let seen = files.any(|file| rig.kernel.device_sees(ioas_id, file, iova).is_some());
                assert!(
                    !seen,
                    "IOAS {ioas_id} shows page {page} of block {number} at the end"
                );
            }
        }
        let scarred = rig.is_scarred();
        drop(rig);
        let left: Vec<_> = (0..IOASES).filter(|&id| kernel.areas(id) != 0).collect();
        // A page of no meaning that could not be unmapped.
        assert!(
            scarred || left.is_empty(),
            "IOASes {left:?} show something at the end"
        );
        assert_eq!(Arc::strong_count(&kernel), 1);
    }
}
