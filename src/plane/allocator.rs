// SPDX-License-Identifier: MIT OR Apache-2.0
//! A thread whose memory comes from where a NUMA policy says.
//!
//! mbind(2) reaches what is allocated by way of a mapping, or in a file that keeps policies by itself
//! (shmem; guest_memfd since Linux 6.19, if it is mapped). A guest_memfd of private pages must have no
//! mapping, and hugetlbfs keeps no policy in its files: what fallocate(2) allocates there goes by the
//! policy of the thread that calls it. The thread is ours, since nobody else's policy is ours to change.

use super::Files;
use crate::attributes::Attribute;
use crate::kernel::linux::block_signals;
use crate::kernel::{CallError, CallResult, Kernel, NumaPolicy};
use crate::units::{Offset, Span};
use crossbeam::channel::{bounded, unbounded, Sender};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

#[derive(Debug)]
struct Request {
    span: Span<Offset>,
    attribute: Attribute,
    done: Sender<CallResult<()>>,
}

/// Ends with its thread when it is dropped.
#[derive(Debug)]
pub(super) struct Allocator {
    requests: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

fn no_thread(errno: i32) -> CallError {
    CallError {
        call: "pthread_create",
        errno,
    }
}

impl Allocator {
    /// EINVAL if the host has none of the policy's nodes.
    pub(super) fn start(
        kernel: Arc<dyn Kernel>,
        files: Arc<Files>,
        policy: NumaPolicy,
    ) -> CallResult<Self> {
        let (requests, inbox) = unbounded::<Request>();
        let (ready, is_ready) = bounded(1);
        let work = move || {
            block_signals();
            let set = kernel.set_thread_policy(&policy);
            let works = set.is_ok();
            // Nobody waits any more only if whoever started this thread has panicked.
            let _ = ready.send(set);
            if !works {
                return;
            }
            for Request {
                span,
                attribute,
                done,
            } in inbox
            {
                let _ = done.send(kernel.allocate(files.of(attribute), span));
            }
        };
        let thread = Builder::new()
            .name("gmem-allocator".into())
            .spawn(work)
            .map_err(|error| no_thread(error.raw_os_error().unwrap_or(libc::EAGAIN)))?;
        let started = Self {
            requests: Some(requests),
            thread: Some(thread),
        };
        is_ready
            .recv()
            .unwrap_or_else(|_| Err(no_thread(libc::EIO)))?;
        Ok(started)
    }

    /// As [`Kernel::allocate`], by the policy. One after the other.
    pub(super) fn allocate(&self, span: Span<Offset>, attribute: Attribute) -> CallResult<()> {
        let (done, is_done) = bounded(1);
        let request = Request {
            span,
            attribute,
            done,
        };
        let requests = self.requests.as_ref().expect("taken when it is dropped");
        // The thread ends before its inbox does only if it panics.
        let sent = requests.send(request).map_err(|_| no_thread(libc::EIO));
        sent?;
        is_done.recv().unwrap_or_else(|_| Err(no_thread(libc::EIO)))
    }
}

impl Drop for Allocator {
    fn drop(&mut self) {
        // It waits for requests until nobody can make any.
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // A panic of it was reported when it happened.
            let _ = thread.join();
        }
    }
}
