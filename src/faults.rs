// SPDX-License-Identifier: MIT OR Apache-2.0
//! What to do when KVM_RUN ends with KVM_EXIT_MEMORY_FAULT.
//!
//! Such an exit has no result: a vCPU that runs again meets the same fault unless something changed.
//! What the guest asked for by its access may be a conversion. It may as well be the echo of another
//! vCPU's conversion, which the kernel noticed half-way; to convert on that would take back what the
//! other one asked for. And some faults nobody can ever serve.

use crate::attributes::Attribute;
use crate::error::{Cause, Error, Result};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::units::{pages_around, Gpa, Span};
use crate::vm::Vm;

/// What became of a memory fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryFault {
    /// The pages have the attribute that the access needs now: run the vCPU again.
    Served,
    /// A conversion came by while the vCPU ran, so that the fault may mean nothing: run the vCPU
    /// again. What was meant comes again.
    Echo,
    /// Nothing here explains it: the pages have the attribute, or an access doesn't convert. Run the vCPU
    /// again; if that goes on, KVM can't serve the access, and nobody else will.
    Unexplained(Error),
    /// What it takes is not to be had at this moment; it may be later. Let the vCPU wait.
    Later(Error),
    /// No later moment will do.
    Never(Error),
}

/// Addresses that share an entry of [`Echoes`].
const REGION_BYTES: u64 = 64 << 10;
const REGIONS: usize = 256;

/// Which conversions the vCPUs may have met on their way: for each region of guest physical address
/// space when the last one ended, by a number that only grows, and how many are under way. Regions
/// share entries, and conversions of neighbours count: an echo too many costs one more KVM_RUN.
#[derive(Debug)]
pub(crate) struct Echoes {
    sequence: AtomicU64,
    entries: Box<[Entry]>,
}

#[derive(Debug, Default)]
struct Entry {
    ended: AtomicU64,
    under_way: AtomicU32,
}

impl Default for Echoes {
    fn default() -> Self {
        let mut entries = Vec::with_capacity(REGIONS);
        entries.resize_with(REGIONS, Entry::default);
        Self {
            sequence: AtomicU64::new(0),
            entries: entries.into(),
        }
    }
}

impl Echoes {
    fn entries_of(&self, gpas: Span<Gpa>) -> impl Iterator<Item = &Entry> {
        let first = gpas.first() / REGION_BYTES;
        let count = (gpas.end() - 1) / REGION_BYTES - first + 1;
        let entry = move |index| &self.entries[((first + index) % REGIONS as u64) as usize];
        (0..count.min(REGIONS as u64)).map(entry)
    }

    /// A conversion of `gpas` is under way until the guard is dropped.
    pub(crate) fn convert(&self, gpas: Span<Gpa>) -> UnderWay<'_> {
        for entry in self.entries_of(gpas) {
            entry.under_way.fetch_add(1, Ordering::SeqCst);
        }
        UnderWay { echoes: self, gpas }
    }

    /// Whether a vCPU that entered KVM_RUN when the sequence was `entered` may have met a conversion
    /// of `gpas`.
    fn may_have_met(&self, gpas: Span<Gpa>, entered: u64) -> bool {
        // In this order: what isn't under way any more has its number.
        let mut entries = self.entries_of(gpas);
        entered != u64::MAX
            && entries.any(|entry| {
                entry.under_way.load(Ordering::SeqCst) != 0
                    || entry.ended.load(Ordering::SeqCst) > entered
            })
    }
}

/// A conversion that vCPUs may notice.
pub(crate) struct UnderWay<'a> {
    echoes: &'a Echoes,
    gpas: Span<Gpa>,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let sequence = self.echoes.sequence.fetch_add(1, Ordering::SeqCst) + 1;
        for entry in self.echoes.entries_of(self.gpas) {
            entry.ended.fetch_max(sequence, Ordering::SeqCst);
            entry.under_way.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Vm {
    /// Grows whenever a conversion ends. A VMM notes it each time before a vCPU enters KVM_RUN, for
    /// [`Vm::memory_fault`].
    pub fn sequence(&self) -> &AtomicU64 {
        &self.echoes.sequence
    }

    /// Serves a KVM_EXIT_MEMORY_FAULT of a vCPU that accessed `size` bytes at `gpa` as if they were
    /// `attribute`: converts them where that is what the guest means, and otherwise says what it is.
    /// `entered` is what [`Vm::sequence`] was before the vCPU entered KVM_RUN. With `u64::MAX` no fault
    /// is an echo: for one that has come again and again.
    ///
    /// `converts`: whether the kind of an access is the guest's choice. On KVM_X86_SW_PROTECTED_VM it
    /// follows the attribute, and no fault asks for anything.
    ///
    /// No memory slot may come or go meanwhile. Locks and waits as [`Vm::convert`], if it converts.
    pub fn memory_fault(
        &self,
        gpa: u64,
        size: u64,
        attribute: Attribute,
        converts: bool,
        entered: u64,
    ) -> MemoryFault {
        let Some(gpas) = pages_around(gpa, size) else {
            return MemoryFault::Never(Error::invalid(format!(
                "{size:#x} bytes at gpa {gpa:#x} are empty or wrap around"
            )));
        };
        match self.needs_conversion(gpas, attribute) {
            Err(error) if is_transient(&error) => MemoryFault::Later(error),
            Err(error) => MemoryFault::Never(error),
            Ok(_) if self.echoes.may_have_met(gpas, entered) => MemoryFault::Echo,
            Ok(false) => MemoryFault::Unexplained(Error::denied(format!(
                "{gpas} is {} already, and KVM does not serve the access",
                attribute.name()
            ))),
            Ok(true) if !converts => MemoryFault::Unexplained(Error::denied(format!(
                "{gpas} is {}, and an access of this guest does not convert it",
                attribute.other().name()
            ))),
            Ok(true) => match self.convert(gpas.first(), gpas.size_bytes(), attribute) {
                Ok(()) => MemoryFault::Served,
                Err(error) if is_transient(&error) => MemoryFault::Later(error),
                Err(error) => MemoryFault::Never(error),
            },
        }
    }

    /// Whether a page of `gpas` lacks the attribute; an error if a conversion could not mend that.
    fn needs_conversion(&self, gpas: Span<Gpa>, attribute: Attribute) -> Result<bool> {
        self.check_not_ended()?;
        self.check_attached()?;
        let segments = self.segments(gpas);
        let found: u64 = segments.iter().map(|s| s.gpas.size_bytes()).sum();
        if found != gpas.size_bytes() {
            return Err(Error::invalid(format!(
                "{gpas} is not guest memory as a whole"
            )));
        }
        let lacks = segments.iter().any(|segment| {
            let attributes = segment.block.attributes();
            attributes.any_change(segment.offsets, attribute)
        });
        Ok(lacks)
    }
}

/// Whether the same may work at another moment, if host or guest free something.
fn is_transient(error: &Error) -> bool {
    match error.cause() {
        Cause::Busy
        | Cause::Detached
        | Cause::Ended
        | Cause::MaxRuns { .. }
        | Cause::MaxRequest { .. }
        | Cause::MaxZeroed { .. }
        | Cause::NoThread
        | Cause::OutOfMemory
        | Cause::PoolEmpty(_)
        | Cause::Held { .. }
        | Cause::Refused { .. } => true,
        Cause::Call(call) => matches!(
            call.errno,
            libc::ENOMEM
                | libc::ENOSPC
                | libc::EAGAIN
                | libc::EINTR
                | libc::EBUSY
                | libc::EMFILE
                | libc::ENFILE
                // Another user of the IOAS has something there.
                | libc::EEXIST
                | libc::EADDRINUSE
        ),
        Cause::Invalid
        | Cause::Unsupported
        | Cause::Exists
        | Cause::Denied
        | Cause::Poisoned { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first: u64, size: u64) -> Span<Gpa> {
        Span::new(Gpa(first), size).unwrap()
    }

    #[test]
    fn a_conversion_is_met_by_who_entered_before_its_end_and_touches_its_region() {
        let echoes = Echoes::default();
        let (here, far) = (span(1 << 30, 4096), span(2 << 30 | 1 << 20, 4096));
        let before = echoes.sequence.load(Ordering::SeqCst);
        assert!(!echoes.may_have_met(here, before));
        let under_way = echoes.convert(here);
        assert!(echoes.may_have_met(here, u64::MAX - 1));
        assert!(!echoes.may_have_met(here, u64::MAX));
        assert!(!echoes.may_have_met(far, before));
        drop(under_way);
        let after = echoes.sequence.load(Ordering::SeqCst);
        assert!(echoes.may_have_met(here, before));
        assert!(!echoes.may_have_met(far, before));
        assert!(!echoes.may_have_met(here, after));
        assert!(!echoes.may_have_met(here, u64::MAX));
    }

    #[test]
    fn a_conversion_of_all_there_is_counts_everywhere() {
        let echoes = Echoes::default();
        let all = span(0, !0xffff);
        drop(echoes.convert(all));
        assert!(echoes.may_have_met(span(77 << 20, 4096), 0));
        let entry = &echoes.entries[3];
        assert_eq!(entry.under_way.load(Ordering::SeqCst), 0);
    }
}
