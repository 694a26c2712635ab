// SPDX-License-Identifier: MIT OR Apache-2.0
//! Owns a guest's memory on top of KVM guest_memfd: which page is private and which shared, which
//! file holds its bytes, and which devices can reach it.
//!
//! QEMU links it as `-object memory-backend-gmem` through a C ABI (feature `capi`, `include/gmem.h`); a
//! VMM in Rust uses the same types directly.
//!
//! # Words
//!
//! | word | meaning |
//! | --- | --- |
//! | [block](Block) | one backend instance: offsets 0..size |
//! | [attribute](Attribute) | private or shared, per page |
//! | plane | where bytes live. *In-place*: one guest_memfd holds both kinds. *Split*: a guest_memfd for private pages, a memfd for shared ones |
//! | binding | where a block's offsets appear in guest physical address space |
//! | [conversion](Vm::convert) | a change of attribute over a range, *to private* or *to shared* |
//! | [DMA window](Window) | one IOAS and the range of IOVAs in it that shows part of a block |
//! | run | pages of one attribute, one next to the other |
//! | range | pages that a call has locked against others, with all that can't change without them (a huge page, a unit of DMA) |
//! | area | one mapping of the kernel in an IOAS; it is unmapped whole, or cut |
//! | [listener](Listener) | anyone who must let go of a range before it changes |
//! | detached | a VM between [`Vm::detach`] and [`Vm::attach`]; *at its end* it is after [`Vm::end`] |
//! | quarantined | kept from devices although shared, or perhaps still with them although private, since undoing a change failed; until it is *healed* |
//! | [poisoned](Block::poison) | without its memory, which the host's hardware has lost, until a reset gives it fresh one |
//!
//! # Invariants
//!
//! 1. The library's attribute of a page is the kernel's, after success and after failure.
//! 2. A page is out of every DMA window and every listener *before* the kernel is told that it is
//!    private.
//! 3. After a conversion to shared the page is reachable in every DMA window that covers it, but for
//!    pages that the host's hardware has lost ([`Block::poison`]): these nobody reaches.
//! 4. Double memory is bounded: a private page holds no shared memory, a shared page no private memory,
//!    but for what a page has just left and may come back to ([`BlockConfig::release_delay`]), which is
//!    counted ([`BlockStats::double_bytes`]) and bounded in bytes and age. Where shared memory is of huge
//!    pages, one of these is held as long as any page of it is shared.
//! 5. A conversion that returns an error left attributes, backing and DMA as they were. If undoing
//!    itself fails, the range is *quarantined*: no device reaches it, an error is logged, a counter
//!    says so, and the VM runs on. So is what became shared in place and could not be mapped for
//!    devices, which stays shared; and what a window that could not be reshaped can't show again.
//!    Devices get what is shared and quarantined when somebody asks for it to be shared, with a
//!    window that is new, reshaped or removed there, with a reset, and from time to time by itself. Bytes of pages that convert in
//!    place are undefined afterwards, also when the conversion was taken back.
//! 6. A guest can't stop the VM, grow host memory without bound, or make the host map what it
//!    should not: bad requests get an error.
//! 7. Conversions of disjoint ranges run in parallel and overlapping ones queue.
//!
//! # Layers
//!
//! Each stands on those below it and knows none above: the C ABI → conversions ([`Vm::convert`], [`Block::reset`]),
//! rebuilds and memory faults → [`Vm`] → [`Block`] → what blocks of a VM have in common → windows and planes → the
//! kernel's calls. Nothing below knows QEMU, nothing above makes a system call. With the feature `fake-kernel`,
//! for tests, the seam to the kernel is public, and with it two kernels in memory.
//!
//! # Threads, signals, fork(2)
//!
//! Any thread may make any call, also in exit handlers. None is async-signal-safe: no call may be made in a signal
//! handler, which may have interrupted one. Only in that of a fault (SIGBUS) which its thread has raised itself by
//! touching a block's memory, outside of the library, may it ask [`Block::run_at`].
//!
//! The library makes threads of its own: one for a VM (gmem-upkeep), from its first DMA window, quarantine, or
//! split block that keeps memory ([`BlockConfig::release_delay`]) on; one for each block with a NUMA policy
//! ([`BlockConfig::policy`]); and those of a preallocation ([`Block::preallocate`]), until that is done. All of them
//! block all signals but those that a fault of their own raises.
//!
//! A child of fork(2) may call nothing here if its parent has several threads, and with any of those it has: what
//! another thread had locked stays locked in the child, and a call may never return. Ending and executing a program
//! need no call; the library has no handlers for either. Until then a child has its parent's VM, whose ioctls the
//! kernel serves for the parent only.
//!
//! # Example
//!
//! Files are anything with `AsFd`. The `VmFd` of kvm-ioctls has none: say
//! `BorrowedFd::borrow_raw(vm_fd.as_raw_fd())`. More examples: [`Memslot`], [`Listener`], [`Vm::memory_fault`],
//! [`Vm::detach`], [`Block::place`], [`Block::reset`], [`Window::reshape`].
//!
//! ```no_run
//! use gmem::{Attribute, Block, BlockConfig, Vm, WindowConfig};
//! # use std::os::fd::OwnedFd;
//! # fn run(vm_file: OwnedFd, iommufd: OwnedFd, ioas_id: u32) -> gmem::Result<()> {
//! let vm = Vm::new(&vm_file)?;
//! let ram = Block::new(&vm, &BlockConfig::confidential("ram", 1 << 30, Attribute::Shared))?;
//! let slot = ram.memslot(0)?; // for KVM_SET_USER_MEMORY_REGION2
//! # let _ = slot;
//! let binding = ram.bind(0, 1 << 30, 0)?;
//! let window = ram.add_window(&iommufd, &WindowConfig {
//!     ioas_id, offset: 0, length: 1 << 30, iova: 0, readonly: false,
//! })?;
//! // KVM_EXIT_HYPERCALL, KVM_HC_MAP_GPA_RANGE:
//! vm.convert(0x20_0000, 0x20_0000, Attribute::Private)?;
//! // Dropped, they end: devices and guest have the block no more. Asked to, they say what went wrong.
//! window.remove()?;
//! binding.unbind()?;
//! # Ok(()) }
//! ```

#![deny(
    missing_docs,
    rustdoc::broken_intra_doc_links,
    unsafe_code,
    unsafe_op_in_unsafe_fn,
    clippy::undocumented_unsafe_blocks
)]
#![warn(missing_debug_implementations)]
// Its unit tests are the library's own, and so is the C ABI, whose numbers and pointers have no schedules.
#![cfg(not(all(test, feature = "shuttle")))]
#![cfg_attr(feature = "shuttle", allow(dead_code))]

mod attributes;
mod backoff;
mod bindings;
mod block;
mod budget;
#[cfg(feature = "capi")]
#[allow(unsafe_code)]
pub mod capi;
mod convert;
mod dma;
mod echoes;
mod error;
mod faults;
#[cfg(not(any(test, feature = "fake-kernel")))]
#[allow(dead_code, unsafe_code, unreachable_pub)]
mod kernel;
#[cfg(any(test, feature = "fake-kernel"))]
#[allow(unsafe_code)]
pub mod kernel;
mod listeners;
mod machine;
mod plane;
mod range_locks;
mod rebuild;
mod run_set;
mod stats;
mod sync;
mod throttle;
mod units;
mod upkeep;
mod vm;
mod words;

pub use attributes::Attribute;
pub use block::{BackingChoice, Binding, Block, BlockConfig, ConvertUnit, Memslot, Window};
pub use dma::{prepare_ioas, DmaPath, DmaSplit, StrategyKind, WindowConfig};
pub use error::{Cause, Error, Result};
pub use faults::MemoryFault;
pub use kernel::{CallError, NumaPolicy, PolicyMode, Probe};
pub use listeners::{Change, Listener, Registration};
pub use plane::Backing;
pub use stats::{BlockStats, VmStats};
pub use units::{Address, Gpa, Iova, Offset, Span, PAGE_SIZE};
pub use vm::Vm;
