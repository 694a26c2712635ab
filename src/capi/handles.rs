// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handles that can be checked: a number that was given out once and never again.

use crate::error::{Error, Result};
use crossbeam::sync::ShardedLock;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};

/// Shared by all tables, so that a handle of one kind is never valid as another. A multiple of 16,
/// as C expects of a pointer; running out would take centuries.
static NEXT: AtomicUsize = AtomicUsize::new(16);

/// The live objects of one kind.
#[derive(Debug)]
pub(super) struct Table<T> {
    /// Sharded, because every access of the VMM to guest memory looks a block up. There are few, so
    /// that hashing would take longer than comparing.
    entries: ShardedLock<BTreeMap<usize, Arc<T>>>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            entries: ShardedLock::default(),
        }
    }
}

impl<T> Table<T> {
    pub(super) fn insert(&self, object: Arc<T>) -> usize {
        let handle = NEXT.fetch_add(16, Ordering::Relaxed);
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.insert(handle, object);
        handle
    }

    pub(super) fn get(&self, handle: usize, kind: &str) -> Result<Arc<T>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries
            .get(&handle)
            .cloned()
            .ok_or_else(|| stale(handle, kind))
    }

    pub(super) fn remove(&self, handle: usize, kind: &str) -> Result<Arc<T>> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.remove(&handle).ok_or_else(|| stale(handle, kind))
    }

    pub(super) fn any(&self, matches: impl Fn(&T) -> bool) -> bool {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.values().any(|object| matches(object))
    }
}

fn stale(handle: usize, kind: &str) -> Error {
    Error::invalid(match handle {
        0 => format!("the {kind} is NULL"),
        _ => format!("the {kind}'s handle is none, or its object has ended"),
    })
}
