// SPDX-License-Identifier: MIT OR Apache-2.0
//! An allocator that knows how much memory is in use.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, and how many bytes are in use, with what malloc adds to each.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
/// The most there was since that was last asked for.
static MOST: AtomicUsize = AtomicUsize::new(0);
/// Beyond this there is no memory.
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// glibc's malloc: a word of its own for each piece, all in multiples of 16, at least 32.
fn taken(layout: Layout) -> usize {
    (layout.size() + 8).next_multiple_of(16).max(32)
}

// SAFETY: every call goes to the system's allocator as it came, or fails as it may.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(taken(layout), Ordering::Relaxed) + taken(layout);
        if now > LIMIT.load(Ordering::Relaxed) {
            IN_USE.fetch_sub(taken(layout), Ordering::Relaxed);
            return std::ptr::null_mut();
        }
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(taken(layout), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that are allocated now.
pub fn in_use() -> usize {
    IN_USE.load(Ordering::Relaxed)
}

/// What was allocated at one moment.
pub struct Heap(usize);

#[allow(dead_code)]
impl Heap {
    pub fn now() -> Self {
        MOST.store(in_use(), Ordering::Relaxed);
        Self(in_use())
    }

    /// How much more there was since then, at most.
    pub fn most_grown(&self) -> usize {
        MOST.load(Ordering::Relaxed).saturating_sub(self.0)
    }

    /// Does something for which there are so many bytes more.
    pub fn with_most<T>(&self, bytes: usize, act: impl FnOnce() -> T) -> T {
        LIMIT.store(self.0 + bytes, Ordering::Relaxed);
        let result = act();
        LIMIT.store(usize::MAX, Ordering::Relaxed);
        result
    }
}
