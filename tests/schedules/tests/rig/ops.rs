// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a thread may do.

use super::*;
use gmem_schedules::{Change, Listener, MemoryFault};

/// A kind of thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A guest's request.
    Convert,
    /// An access of a vCPU.
    Fault,
    /// A block's memory slot goes, is elsewhere for a while, and comes back.
    Rebind,
    /// A device comes and goes.
    Window,
    /// A device's window shows less for a while.
    Reshape,
    /// The VM is made anew.
    Rebuild,
    Poison,
    Reset,
    Discard,
    /// The VMM writes into guest memory.
    Place,
    Listen,
    /// One more block comes and goes.
    Block,
    /// Time passes, and the VM's upkeep looks what is due: memory to be freed, devices to be healed.
    Tend,
    /// The process is about to end.
    End,
}

/// One thing to do, all of it decided.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    pub kind: Kind,
    pub block: usize,
    /// Of the address space at home, in pages.
    pub first: u64,
    pub count: u64,
    pub attribute: Attribute,
    /// In which IOAS; which errno; and whatever else there is a choice.
    pub pick: u32,
}

impl Op {
    /// Some range of `pages`, some of these kinds.
    pub fn draw(kinds: &[Kind], pages: u64) -> Self {
        let rng = &mut shuttle::rand::thread_rng();
        let first = rng.gen_range(0..pages);
        Self {
            kind: kinds[rng.gen_range(0..kinds.len())],
            block: rng.gen_range(0..BLOCKS),
            first,
            count: rng.gen_range(1..=pages - first),
            attribute: match rng.gen_bool(0.6) {
                true => Attribute::Private,
                false => Attribute::Shared,
            },
            pick: rng.gen(),
        }
    }

    /// Does it. Whatever `allowed` doesn't allow is a failure of the test; answers whether it was done.
    pub fn run(&self, rig: &Arc<Rig>, thread: usize, allowed: &[i32]) -> bool {
        tell(format_args!("{self:?}"));
        let done = self.try_run(rig, thread, allowed);
        tell(format_args!("{done:?}"));
        match done {
            Ok(()) => true,
            Err(error) => {
                let errno = error.errno();
                let fine = allowed.contains(&errno) || rig.setup.failures.is_some();
                assert!(fine, "{self:?}: {error}");
                false
            }
        }
    }

    fn try_run(
        &self,
        rig: &Arc<Rig>,
        thread: usize,
        allowed: &[i32],
    ) -> gmem_schedules::Result<()> {
        let block = &rig.blocks[self.block];
        let grain = rig.setup.grain;
        let size = self.count * grain;
        // Of one block.
        let first = self.first % rig.setup.pages;
        let count = self.count.min(rig.setup.pages - first);
        let offset = first * grain;
        let part = count * grain;
        match self.kind {
            Kind::Convert => {
                let moves = self.pick % 4 == 0 && allowed.contains(&libc::EINVAL);
                let (gpa, size) = match moves {
                    true => (rig.elsewhere(self.block) + offset, part),
                    false => (HOME + self.first * grain, size),
                };
                rig.vm.convert(gpa, size, self.attribute)
            }
            Kind::Fault => {
                let entered = rig.vm.sequence().load(Ordering::SeqCst);
                step();
                let gpa = HOME + self.first * grain;
                let met = rig
                    .vm
                    .memory_fault(gpa, size, self.attribute, true, entered);
                match met {
                    MemoryFault::Later(error) | MemoryFault::Never(error) => Err(error),
                    _ => Ok(()),
                }
            }
            Kind::Rebind => {
                let _noted = rig.bindings_change.lock().unwrap();
                let other = (self.block + 1) % BLOCKS;
                let unbind = |number| match rig.address(number) {
                    Some(gpa) => rig.unbind(number, gpa),
                    None => Ok(()),
                };
                unbind(self.block)?;
                match self.pick % 4 {
                    // A request that comes late finds nothing there,
                    0 => return rig.bind(self.block, rig.elsewhere(self.block)),
                    // or what belongs to another block.
                    1 => {
                        unbind(other)?;
                        rig.bind(self.block, rig.home(other))?;
                        return rig.bind(other, rig.home(self.block));
                    }
                    2 => {
                        rig.bind(self.block, rig.elsewhere(self.block))?;
                        step();
                        unbind(self.block)?;
                    }
                    _ => {}
                }
                let taken = locked(&rig.bound).contains_key(&rig.home(self.block));
                match taken {
                    true => Ok(()),
                    false => rig.bind_home(self.block),
                }
            }
            Kind::Window => {
                let ioas_id = LASTING_IOASES + thread as u32;
                match rig.lasting(self.block, ioas_id) {
                    // Two at the same addresses of an IOAS are refused.
                    Some(_) if self.pick % 8 == 0 => {}
                    Some(left) => return rig.remove_window(&left),
                    None => {}
                }
                let shown = rig.add_window(self.block, ioas_id, first..first + count)?;
                if self.pick % 3 == 0 {
                    return Ok(());
                }
                step();
                rig.remove_window(&shown)
            }
            Kind::Reshape => {
                let ioas_id = self.pick % LASTING_IOASES;
                let Some(shown) = rig.lasting(self.block, ioas_id) else {
                    return Ok(());
                };
                let config = |pages| rig.window_config(self.block, ioas_id, pages);
                shown.window.reshape(&config(first..first + count))?;
                if self.pick % 5 == 0 {
                    return Ok(());
                }
                step();
                shown.window.reshape(&config(0..rig.setup.pages))
            }
            Kind::Rebuild => {
                let _noted = rig.bindings_change.lock().unwrap();
                rig.remove_slots();
                if let Err(error) = rig.vm.detach() {
                    rig.add_slots();
                    return Err(error);
                }
                locked(&rig.bound).clear();
                rig.kernel.rebuild_vm();
                step();
                rig.vm.attach(&rig.iommufd)?;
                (0..BLOCKS).try_for_each(|number| rig.bind_home(number))
            }
            Kind::Poison => match self.pick % 2 {
                0 => block.poison(offset, part),
                _ => rig.vm.poison(HOME + self.first * grain, size),
            },
            Kind::Reset => block.reset(),
            Kind::Discard => {
                let span = Span::new(gmem_schedules::Offset(offset), part).unwrap();
                for attribute in [Attribute::Private, Attribute::Shared] {
                    rig.kernel.give_up(block.file(attribute), span);
                }
                block.discard(offset, part)
            }
            // It would leave parts of what all else comes in.
            Kind::Place if grain != PAGE => Ok(()),
            Kind::Place => block.place(offset + 17, &[7; 5000][..part.min(5000) as usize - 17]),
            Kind::Listen => {
                let watch = Arc::new(Watch {
                    changing: Mutex::default(),
                    listens: AtomicBool::new(true),
                    refuses: (self.pick % 4 == 0).then_some(libc::EPERM),
                });
                let listening = block.add_listener(watch.clone());
                step();
                drop(listening);
                watch.listens.store(false, Ordering::SeqCst);
                assert!(locked(&watch.changing).is_empty(), "no end was told");
                Ok(())
            }
            Kind::Block => {
                let block = rig.new_block()?;
                let gpa = rig.home(BLOCKS);
                let file = block.file(Attribute::Shared);
                rig.kernel.add_slot(rig.gpas(gpa), file, 0);
                let bound = block.bind(0, rig.bytes(), gpa);
                let ioas_id = LASTING_IOASES + thread as u32;
                let config = rig.window_config(BLOCKS, ioas_id, 0..rig.setup.pages);
                let window = block.add_window(&rig.iommufd, &config);
                step();
                // As a VMM that unplugs memory.
                rig.kernel.remove_slot(rig.gpas(gpa));
                // Or it ends with the block.
                let bound = bound.and_then(|binding| match self.pick % 2 {
                    0 => binding.unbind(),
                    _ => {
                        binding.keep();
                        Ok(())
                    }
                });
                match window {
                    Ok(window) if self.pick % 3 == 0 => window.remove()?,
                    // Dropped with the block.
                    Ok(_) => {}
                    Err(error) => return Err(error),
                }
                bound
            }
            Kind::Tend => {
                match self.pick % 3 {
                    0 => block.release_pending(),
                    _ => (0..self.pick % 4).for_each(|_| rig.let_time_pass()),
                }
                Ok(())
            }
            Kind::End => {
                rig.ended.store(true, Ordering::SeqCst);
                rig.vm.end()
            }
        }
    }
}

/// A listener that knows what to expect.
struct Watch {
    changing: Mutex<Vec<Change>>,
    listens: AtomicBool,
    refuses: Option<i32>,
}

impl Watch {
    fn check(&self) {
        assert!(self.listens.load(Ordering::SeqCst), "called after its end");
    }
}

impl Listener for Watch {
    fn begin(&self, change: &Change) -> Result<(), i32> {
        self.check();
        step();
        {
            let mut changing = locked(&self.changing);
            let met = changing
                .iter()
                .find(|other| other.span.overlaps(&change.span));
            assert!(met.is_none(), "{change:?} during {met:?}");
            if self.refuses.is_none() || change.span.first() == 0 {
                changing.push(*change);
                return Ok(());
            }
        }
        Err(self.refuses.unwrap_or(libc::EIO))
    }

    fn end(&self, change: &Change, _changed: bool) {
        self.check();
        step();
        let mut changing = locked(&self.changing);
        let begun = changing.iter().position(|other| other == change);
        changing.remove(begun.expect("an end without a begin"));
    }
}
