// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the kernel hears of a block's attributes.
//!
//! In a split block the VM keeps them, by guest physical address: a call is all or nothing, and a
//! binding brings its attributes along. In place the guest_memfd keeps them, by offset, bound or
//! not, and a page that somebody holds can't become private. A file of huge pages converts one after
//! the other: what was asked for half in vain is taken back here, so that above this line every
//! conversion is all or nothing.

use super::Block;
use crate::attributes::Attribute;
use crate::backoff::Backoff;
use crate::error::{Cause, Doing, Error, Of, Result};
use crate::plane::{Backing, Halted, Patience};
use crate::throttle::Class;
use crate::units::{Gpa, Offset, Span};

impl Block {
    /// Tells the VM that the pages at `gpas` have an attribute; in place there is nothing to tell.
    /// EAGAIN says that somebody holds a page at this moment, which the guest can't wait for by itself
    /// everywhere: for SNP any error is fatal. So the host waits, a little.
    pub(crate) fn tell_vm(&self, gpas: Span<Gpa>, attribute: Attribute) -> Result<()> {
        if self.backing() == Backing::InPlace {
            return Ok(());
        }
        let mut backoff = Backoff::default();
        loop {
            self.core.counters.attribute_calls.add(1);
            let vm = &self.core.machine;
            let told = vm.kernel().set_memory_attributes(vm.fd(), gpas, attribute);
            match told {
                Err(call) if call.errno == libc::EAGAIN && backoff.wait() => {
                    self.core.counters.retries.add(1);
                }
                done => {
                    return done
                        .doing(|| format!("making {gpas} {}", attribute.name()))
                        .of(&self.core.name)
                }
            }
        }
    }

    /// Converts `span` in place, and notes it: all of it or nothing. Should what was done not be
    /// taken back after a failure, that is noted, and quarantined.
    ///
    /// In a file of huge pages, all of `span` has the other attribute now.
    pub(crate) fn tell_file(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        let told = self.convert_in_place(span, attribute, &mut Patience::default());
        let Err(halted) = told else {
            self.record(span, attribute);
            return Ok(());
        };
        let error = self.could_not_convert(span, attribute, &halted);
        if halted.end > span.first() {
            let done = Span::between(span.first(), halted.end);
            self.record(done, attribute);
            self.revert(done, attribute.other());
        }
        Err(error)
    }

    /// The way back of a conversion that has gone as far as `span`.
    fn revert(&self, span: Span<Offset>, attribute: Attribute) {
        let end = match self.convert_in_place(span, attribute, &mut Patience::default()) {
            Ok(()) => span.end(),
            Err(halted) => {
                let error = self.could_not_convert(span, attribute, &halted);
                let vm = &self.core.machine;
                // Nobody looks for who holds a page with a range locked.
                vm.voices.say(module_path!(), Class::Trouble, || {
                    format!("undoing a conversion failed: {error:#}")
                });
                halted.end
            }
        };
        if end > span.first() {
            self.record(Span::between(span.first(), end), attribute);
        }
        if end < span.end() {
            self.windows.quarantine(Span::between(end, span.end()));
        }
    }

    pub(super) fn convert_in_place(
        &self,
        span: Span<Offset>,
        attribute: Attribute,
        patience: &mut Patience,
    ) -> std::result::Result<(), Halted> {
        let file = self.core.planes.converting();
        file.convert(span, attribute, patience, &self.core.counters)
    }

    fn could_not_convert(
        &self,
        span: Span<Offset>,
        attribute: Attribute,
        Halted { end, stopped }: &Halted,
    ) -> Error {
        let rest = Span::<Offset>::between(*end.max(&span.first()), span.end());
        let doing = format!("making {rest} {}", attribute.name());
        let call = stopped.call.clone();
        let error = match (stopped.at, call.errno) {
            (Some(offset), libc::EAGAIN) => {
                let host = self.host() as u64 + offset;
                Error::new(Cause::Held { offset, host, call }, doing)
            }
            (Some(at), _) => {
                let doing = format!("{doing}, stopped at offset {at:#x}");
                Error::new(Cause::Call(call), doing)
            }
            (None, _) => Error::new(Cause::Call(call), doing),
        };
        error.of(&self.core.name)
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use crate::kernel::fake::{FakeKernel, VmKind};
    use crate::kernel::holders::looking;
    use crate::units::PAGE_SIZE;
    use crate::{Attribute, Block, BlockConfig, Vm};
    use std::cell::Cell;
    use std::rc::Rc;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    /// Prints what is logged on this thread, and so has the sentence made.
    struct Prints;

    impl log::Log for Prints {
        fn enabled(&self, _metadata: &log::Metadata) -> bool {
            true
        }
        fn log(&self, record: &log::Record) {
            let _ = record.args().to_string();
        }
        fn flush(&self) {}
    }

    /// A search takes long: neither the guest that can't have a page nor any other vCPU is to wait for it
    /// unless its result is printed, and nobody but who prints it.
    #[test]
    fn who_holds_a_page_is_looked_for_outside_locks_and_only_if_it_is_printed() {
        let _ = log::set_boxed_logger(Box::new(Prints));
        log::set_max_level(log::LevelFilter::Warn);
        const PAGES: u64 = 16;
        let kernel = Arc::new(FakeKernel::new(VmKind::InPlace));
        let fd = std::fs::File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        let config = BlockConfig::confidential("ram", PAGES * PAGE_SIZE, Attribute::Shared);
        let block = Block::new(&vm, &config).unwrap();
        block.bind(0, PAGES * PAGE_SIZE, 0).unwrap().keep();
        kernel.hold(block.file(Attribute::Private), 3 * PAGE_SIZE, usize::MAX);
        let looks = Rc::new(Cell::new(0u32));
        looking::then({
            let (looks, vm, block) = (looks.clone(), vm.clone(), block.clone());
            move || {
                looks.set(looks.get() + 1);
                let all = (block.number(), block.span());
                let free = vm.machine().ranges.lock_until(all, Instant::now());
                assert!(free.is_some(), "somebody waits for this search");
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let mut last = None;
        const STORM: u32 = 5;
        for _ in 0..STORM {
            let refused = vm.convert(0, PAGES * PAGE_SIZE, Attribute::Private);
            last = refused.err();
        }
        // The log has one line a second of them, and the storm lasts half of one.
        assert!(
            (1..STORM).contains(&looks.get()),
            "{} searches",
            looks.get()
        );
        let printed = looks.get();
        let error = last.unwrap();
        assert_eq!(error.errno(), libc::EAGAIN);
        assert!(format!("{error:#}").contains("stopped at offset 0x3000: "));
        assert_eq!(looks.get(), printed);
        let text = error.to_string();
        assert!(text.contains("at offset 0x3000 (no holder"), "{text}");
        assert_eq!(looks.get(), printed + 1);
    }
}
