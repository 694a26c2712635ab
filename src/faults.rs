// SPDX-License-Identifier: MIT OR Apache-2.0
//! What to do when KVM_RUN ends with KVM_EXIT_MEMORY_FAULT.
//!
//! Such an exit has no result: a vCPU that runs again meets the same fault unless something changed.
//! What the guest asked for by its access may be a conversion. It may as well be the echo of another
//! vCPU's conversion, which the kernel noticed half-way; to convert on that would take back what the
//! other one asked for. And some faults nobody can ever serve.

use crate::attributes::Attribute;
use crate::error::{Cause, Error, Result};
use crate::sync::atomic::AtomicU64;
use crate::units::{pages_around, Gpa, Span};
use crate::vm::Vm;

/// What became of a memory fault.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "it says whether the vCPU may run again"]
#[non_exhaustive]
pub enum MemoryFault {
    /// The pages have the attribute that the access needs now: run the vCPU again.
    Served,
    /// A conversion came by while the vCPU ran, so that the fault may mean nothing: run the vCPU
    /// again. What was meant comes again.
    Echo,
    /// Nothing here explains it: the pages have the attribute, or an access doesn't convert. Run the vCPU
    /// again; if that goes on, KVM can't serve the access, and nobody else will.
    Unexplained(Error),
    /// What it takes is not to be had at this moment; it may be later. Let the vCPU wait, and run
    /// it again.
    Later(Error),
    /// No later moment will do: the vCPU can't go on.
    Never(Error),
}

impl Vm {
    /// A number that grows whenever a conversion ends. A VMM reads it, with acquire semantics, each
    /// time before a vCPU enters KVM_RUN, and hands what it read to [`Vm::memory_fault`] if the
    /// vCPU comes out with a memory fault.
    pub fn sequence(&self) -> &AtomicU64 {
        self.echoes.sequence()
    }

    /// Serves a KVM_EXIT_MEMORY_FAULT of a vCPU that accessed `size` bytes at `gpa` as if they were
    /// `attribute` (private if the exit's flags have KVM_MEMORY_EXIT_FLAG_PRIVATE): converts them
    /// where that is what the guest means, and otherwise says what it is ([`MemoryFault`]).
    ///
    /// `entered` is the number of [`Vm::sequence`] from before the vCPU entered KVM_RUN. With
    /// `u64::MAX` no fault is an echo: for one that has been [`MemoryFault::Echo`] again and again.
    ///
    /// `converts` says whether the kind of an access is the guest's choice. On
    /// KVM_X86_SW_PROTECTED_VM it follows the attribute, and no fault asks for anything.
    ///
    /// No memory slot may come or go meanwhile. If it converts, it locks and waits
    /// as [`Vm::convert`]: call it without a lock that others wait for.
    ///
    /// # Example
    /// ```
    /// # use gmem::kernel::fake::{FakeKernel, VmKind};
    /// # fn main() -> gmem::Result<()> {
    /// # let file = std::fs::File::open("/dev/null").unwrap();
    /// # let kernel = std::sync::Arc::new(FakeKernel::new(VmKind::Confidential));
    /// # let vm = gmem::Vm::with_kernel(kernel.clone(), &file)?;
    /// use gmem::{Attribute, Block, BlockConfig, MemoryFault};
    /// use std::sync::atomic::Ordering;
    /// # let ram = Block::new(&vm, &BlockConfig::confidential("ram", 1 << 20, Attribute::Shared))?;
    /// # let binding = ram.bind(0, 1 << 20, 0)?;
    /// let entered = vm.sequence().load(Ordering::Acquire);
    /// // KVM_RUN, and out it comes with KVM_EXIT_MEMORY_FAULT: a private access to a shared page.
    /// match vm.memory_fault(0x1000, 0x1000, Attribute::Private, true, entered) {
    ///     MemoryFault::Served | MemoryFault::Echo => {} // KVM_RUN
    ///     MemoryFault::Unexplained(error) => eprintln!("{error}"), // KVM_RUN, but not without end
    ///     MemoryFault::Later(error) => eprintln!("the vCPU waits: {error}"),
    ///     MemoryFault::Never(error) => panic!("the vCPU can't go on: {error}"),
    ///     other => panic!("the vCPU can't go on: {other:?}"),
    /// }
    /// assert_eq!(ram.stats().bytes_private, 0x1000);
    /// # Ok(()) }
    /// ```
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
        self.machine().check_attached()?;
        let (segments, _) = self.segments(gpas);
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
        // The same again is no less.
        Cause::MaxRequest { .. }
        | Cause::Invalid
        | Cause::Unsupported
        | Cause::Exists
        | Cause::Denied
        | Cause::Poisoned { .. } => false,
    }
}
