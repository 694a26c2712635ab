// SPDX-License-Identifier: MIT OR Apache-2.0
//! Those who must let go of a range before it changes, and may take it again after.

use crate::attributes::Attribute;
use crate::error::{Cause, Error, Result};
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, Weak};
use crate::units::{Offset, Span};
use std::fmt;

/// One conversion, as a listener sees it. `begin` and `end` of the same conversion carry the same
/// one; sequence numbers of a block only grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which pages.
    pub span: Span<Offset>,
    /// What they are to become.
    pub attribute: Attribute,
    /// Which conversion of this block.
    pub sequence: u64,
}

/// Somebody who uses a block's shared bytes.
///
/// Both calls, of begin and of end, run on the thread that converts, with the range locked. Of the library they may
/// call only what asks about a block: [`Block::host`](crate::Block::host), its files,
/// [`Block::memslot`](crate::Block::memslot), [`Block::run_at`](crate::Block::run_at),
/// [`Block::max_order`](crate::Block::max_order), [`Block::check_access`](crate::Block::check_access) and
/// [`Block::stats`](crate::Block::stats). Everything else may wait for this very conversion, also what gives memory
/// back ([`Block::discard`](crate::Block::discard), [`Block::release_pending`](crate::Block::release_pending)) or
/// makes it good ([`Block::poison`](crate::Block::poison), [`Block::place`](crate::Block::place)). Nor may they wait
/// for somebody who calls any of that, or take a lock that somebody holds who does.
///
/// # In Rust
/// So nothing may be dropped there whose end waits: a [`Binding`](crate::Binding), a [`Window`](crate::Window), a
/// [`Registration`], the last reference to a [`Block`](crate::Block).
///
/// The block owns its listeners as long as they are registered: one that owns its block ([`Arc`]) and its own
/// [`Registration`] keeps both for ever. Hold a [`Weak`].
/// Neither call may panic: what has begun would not be ended for the others.
///
/// # Example
/// ```
/// # use gmem::kernel::fake::{FakeKernel, VmKind};
/// # fn main() -> gmem::Result<()> {
/// # let file = std::fs::File::open("/dev/null").unwrap();
/// # let kernel = std::sync::Arc::new(FakeKernel::new(VmKind::Confidential));
/// # let vm = gmem::Vm::with_kernel(kernel.clone(), &file)?;
/// use gmem::{Attribute, Block, BlockConfig, Change, Listener};
/// use std::sync::{Arc, Mutex};
///
/// /// Which pages somebody must not touch.
/// #[derive(Default)]
/// struct Closed(Mutex<Vec<Change>>);
///
/// impl Listener for Closed {
///     fn begin(&self, change: &Change) -> Result<(), i32> {
///         // Refused by Err(libc::EBUSY), the guest would get an error.
///         self.0.lock().unwrap().push(*change);
///         Ok(())
///     }
///
///     fn end(&self, change: &Change, changed: bool) {
///         // What is private stays closed.
///         let closed = changed == (change.attribute == Attribute::Private);
///         if !closed {
///             self.0.lock().unwrap().retain(|begun| begun != change);
///         }
///     }
/// }
/// # let ram = Block::new(&vm, &BlockConfig::confidential("ram", 1 << 20, Attribute::Shared))?;
/// # let binding = ram.bind(0, 1 << 20, 0)?;
/// let closed = Arc::new(Closed::default());
/// let registration = ram.add_listener(closed.clone());
/// vm.convert(0, 0x2000, Attribute::Private)?;
/// let spans: Vec<_> = closed.0.lock().unwrap().iter().map(|change| change.span.size_bytes()).collect();
/// assert_eq!(spans, [0x2000]);
/// # Ok(()) }
/// ```
pub trait Listener: Send + Sync {
    /// Pages are about to change, and have not yet: let go of them if they become private. Called
    /// once for each run of pages that changes. All runs of one conversion have one sequence: a
    /// begin and its end are a pair by their offset and size, too.
    ///
    /// Who refuses a run ends the conversion with its errno, and is not told of the end of that
    /// run, but of those that it had accepted. [`Vm::detach`](crate::Vm::detach) can't be refused:
    /// that is logged, the pages change all the same, and who refused is not told of their end.
    ///
    /// # In Rust
    /// A positive errno refuses the conversion, and anything else as EIO.
    fn begin(&self, change: &Change) -> std::result::Result<(), i32>;
    /// They have changed (`changed`), or all is as before. Where a conversion failed half-way and
    /// could not be undone, which is logged, it is said to be what lets nobody use a private page:
    /// to have happened, if to private, and else not.
    fn end(&self, change: &Change, changed: bool);
}

struct Entry {
    listener: Arc<dyn Listener>,
    uses: Mutex<Uses>,
    idle: Condvar,
}

impl Entry {
    fn begin(&self, change: &Change) -> std::result::Result<(), i32> {
        // The largest errno that Linux has room for is 4095. What is none would be no error in C.
        let errno = |said| match said {
            1..=4095 => said,
            _ => libc::EIO,
        };
        self.listener.begin(change).map_err(errno)
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listener")
    }
}

#[derive(Default)]
struct Uses {
    /// Conversions that have the listener in their plan.
    active: u64,
    /// Somebody waits for the last of them: waking nobody costs a system call too.
    awaited: bool,
}

/// One registration of a listener.
///
/// # In Rust
/// Until this is dropped: then it is told no more, and no call of it is under way. So
/// it must not be dropped in such a call, nor by who keeps one from its end.
///
/// It keeps no block: of one that has ended, nobody hears.
#[derive(Debug)]
#[must_use = "a listener is told nothing once this is dropped"]
pub struct Registration {
    listeners: Weak<Listeners>,
    entry: Arc<Entry>,
}

impl Registration {
    /// It goes on without this, until the block's end.
    pub fn keep(mut self) {
        self.listeners = Weak::new();
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(listeners) = self.listeners.upgrade() {
            listeners.remove(&self.entry);
        }
    }
}

/// The listeners of one block.
#[derive(Debug)]
pub(crate) struct Listeners {
    /// Replaced as a whole: each conversion has one to keep.
    entries: RwLock<Arc<[Arc<Entry>]>>,
    /// Of `entries`, for who has nothing to tell anybody.
    count: AtomicUsize,
    sequence: AtomicU64,
}

impl Default for Listeners {
    fn default() -> Self {
        Self {
            entries: RwLock::new(Arc::new([])),
            count: AtomicUsize::new(0),
            sequence: AtomicU64::new(0),
        }
    }
}

impl Listeners {
    pub(crate) fn add(self: &Arc<Self>, listener: Arc<dyn Listener>) -> Registration {
        let entry = Arc::new(Entry {
            listener,
            uses: Mutex::default(),
            idle: Condvar::new(),
        });
        self.change(|entries| entries.push(entry.clone()));
        Registration {
            listeners: Arc::downgrade(self),
            entry,
        }
    }

    /// Takes a listener out and waits until no conversion calls it any more.
    fn remove(&self, removed: &Arc<Entry>) {
        self.change(|entries| entries.retain(|entry| !Arc::ptr_eq(entry, removed)));
        let mut now = removed.uses.lock().unwrap_or_else(PoisonError::into_inner);
        now.awaited = true;
        let idle = removed.idle.wait_while(now, |now| now.active != 0);
        drop(idle.unwrap_or_else(PoisonError::into_inner));
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Entry>>)) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = entries.to_vec();
        change(&mut changed);
        self.count.store(changed.len(), Ordering::Release);
        *entries = changed.into();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// The listeners of one conversion: the same for its begin and its end, whoever comes and goes
    /// meanwhile. `None` if nobody listens. Who adds one has the block locked, so that no conversion that
    /// looks has begun before.
    pub(crate) fn freeze(&self) -> Option<Frozen> {
        if self.is_empty() {
            return None;
        }
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        if entries.is_empty() {
            return None;
        }
        for entry in entries.iter() {
            let mut now = entry.uses.lock().unwrap_or_else(PoisonError::into_inner);
            now.active += 1;
        }
        Some(Frozen {
            entries: entries.clone(),
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed) + 1,
        })
    }
}

/// The listeners that one conversion informs.
#[derive(Debug)]
pub(crate) struct Frozen {
    entries: Arc<[Arc<Entry>]>,
    sequence: u64,
}

impl Frozen {
    fn change(&self, span: Span<Offset>, attribute: Attribute) -> Change {
        Change {
            span,
            attribute,
            sequence: self.sequence,
        }
    }

    /// Tells all that `span` is about to change. If one refuses, those told before it are told that
    /// nothing changed.
    pub(crate) fn begin(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        let change = self.change(span, attribute);
        for (told, entry) in self.entries.iter().enumerate() {
            if let Err(errno) = entry.begin(&change) {
                for entry in &self.entries[..told] {
                    entry.listener.end(&change, false);
                }
                return Err(refused(&change, errno));
            }
        }
        Ok(())
    }

    /// Tells all of a change that nobody can refuse, before and after `happen`. Who refuses it all the
    /// same isn't told of its end, and is in the error.
    pub(crate) fn impose(
        &self,
        span: Span<Offset>,
        attribute: Attribute,
        happen: impl FnOnce(),
    ) -> Result<()> {
        let change = self.change(span, attribute);
        let begin = |entry: &Arc<Entry>| entry.begin(&change);
        let begun: Vec<_> = self.entries.iter().map(begin).collect();
        happen();
        let mut result = Ok(());
        for (entry, begun) in self.entries.iter().zip(begun) {
            match begun {
                Ok(()) => entry.listener.end(&change, true),
                Err(errno) => result = result.and(Err(refused(&change, errno))),
            }
        }
        result
    }

    pub(crate) fn end(&self, span: Span<Offset>, attribute: Attribute, changed: bool) {
        let change = self.change(span, attribute);
        for entry in self.entries.iter() {
            entry.listener.end(&change, changed);
        }
    }
}

fn refused(change: &Change, errno: i32) -> Error {
    let Change {
        span, attribute, ..
    } = change;
    let what = format!("making {span} {}", attribute.name());
    Error::new(Cause::Refused { errno }, what)
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for entry in self.entries.iter() {
            let mut now = entry.uses.lock().unwrap_or_else(PoisonError::into_inner);
            now.active -= 1;
            if now.awaited {
                entry.idle.notify_all();
            }
        }
    }
}
