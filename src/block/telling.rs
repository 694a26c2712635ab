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
use crate::error::{Doing, Error, Result};
use crate::kernel::holders;
use crate::plane::{Backing, Halted, Patience};
use crate::throttle::limited;
use crate::units::{Gpa, Offset, Span, PAGE_SIZE};

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
            self.counters.attribute_calls.add(1);
            let vm = &self.vm;
            let told = vm.kernel().set_memory_attributes(vm.fd(), gpas, attribute);
            match told {
                Err(call) if call.errno == libc::EAGAIN && backoff.wait() => {
                    self.counters.retries.add(1);
                }
                done => {
                    return done
                        .doing(|| format!("{}: making {gpas} {}", self.name, attribute.name()))
                }
            }
        }
    }

    /// Makes addresses without a binding shared for the VM. Should that fail, it is made up for when
    /// they are bound again.
    /// The caller has the addresses locked.
    pub(super) fn share_in_vm(&self, gpas: Span<Gpa>) -> Result<()> {
        let told = self.tell_vm(gpas, Attribute::Shared);
        let mut bindings = self.vm.bindings();
        match told {
            Ok(()) => bindings.are_shared(gpas),
            Err(_) => bindings.leave_private(gpas),
        }
        told
    }

    /// The same, for who has no error to give.
    pub(super) fn forget_in_vm(&self, gpas: Span<Gpa>) {
        if let Err(error) = self.share_in_vm(gpas) {
            limited!(
                error,
                "{error}: the kernel keeps attributes for addresses that nothing is bound at"
            );
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
        // Before the way back, which may wait: who holds a page now?
        let error = self.could_not_convert(span, attribute, &halted);
        if halted.end > span.first() {
            let done = Span::between(span.first(), halted.end);
            self.record(done, attribute);
            self.take_back(done, attribute.other());
        }
        Err(error)
    }

    /// The way back of a conversion that has gone as far as `span`.
    fn take_back(&self, span: Span<Offset>, attribute: Attribute) {
        let end = match self.convert_in_place(span, attribute, &mut Patience::default()) {
            Ok(()) => span.end(),
            Err(halted) => {
                let error = self.could_not_convert(span, attribute, &halted);
                let vm = &self.vm;
                vm.complain(|| format!("undoing a conversion failed: {error}"));
                halted.end
            }
        };
        if end > span.first() {
            self.record(Span::between(span.first(), end), attribute);
        }
        if end < span.end() {
            self.quarantine_span(Span::between(end, span.end()));
        }
    }

    pub(super) fn convert_in_place(
        &self,
        span: Span<Offset>,
        attribute: Attribute,
        patience: &mut Patience,
    ) -> std::result::Result<(), Halted> {
        let file = self.planes.converting();
        file.convert(span, attribute, patience, &self.counters)
    }

    fn could_not_convert(
        &self,
        span: Span<Offset>,
        attribute: Attribute,
        Halted { end, stopped }: &Halted,
    ) -> Error {
        let rest = Span::<Offset>::between(*end.max(&span.first()), span.end());
        let at = match (stopped.at, stopped.call.errno) {
            (Some(at), libc::EAGAIN) => {
                let host = self.host() as u64 + at;
                let holders = holders::describe(host..host + PAGE_SIZE);
                format!(", stopped at offset {at:#x} ({holders})")
            }
            (Some(at), _) => format!(", stopped at offset {at:#x}"),
            (None, _) => String::new(),
        };
        Error::Kernel {
            doing: format!("{}: making {rest} {}{at}", self.name, attribute.name()),
            call: stopped.call.clone(),
        }
    }
}
