// SPDX-License-Identifier: MIT OR Apache-2.0
//! A conversion in place, led on from where the kernel stopped.
//!
//! Signals interrupt one, who holds a page stops it, and a file of huge pages converts one after the
//! other: it is the caller who knows from where to go on. A page that has converted must not be named
//! again: on TDX that loses what it holds.

use crate::attributes::Attribute;
use crate::backoff::Backoff;
use crate::kernel::{Kernel, Stopped};
use crate::stats::BlockCounters;
use crate::units::{Offset, Span};
use std::os::fd::BorrowedFd;

/// A call that signals interrupt is made again this often: no storm of them may keep a vCPU for ever.
const INTERRUPTIONS: u32 = 1000;

/// How long conversions in place are tried: by one patience, all of them together.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    backoff: Backoff,
    interruptions: u32,
}

impl Patience {
    /// Waits, if a call that failed like that is worth another attempt.
    pub(crate) fn allows(&mut self, errno: i32) -> bool {
        match errno {
            libc::EAGAIN => self.backoff.wait(),
            libc::EINTR => {
                self.interruptions += 1;
                self.interruptions <= INTERRUPTIONS
            }
            _ => false,
        }
    }
}

/// A conversion in place that has failed.
#[derive(Debug)]
pub(crate) struct Halted {
    /// Pages before it have converted.
    pub(crate) end: u64,
    pub(crate) stopped: Stopped,
}

/// A guest_memfd that converts, of single pages or of huge ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Converting<'a> {
    pub(crate) kernel: &'a dyn Kernel,
    pub(crate) file: BorrowedFd<'a>,
    pub(crate) huge_page: Option<u64>,
}

impl Converting<'_> {
    /// Has the kernel convert `span`, going on from where it stopped as long as that helps.
    pub(crate) fn convert(
        &self,
        span: Span<Offset>,
        attribute: Attribute,
        patience: &mut Patience,
        counters: &BlockCounters,
    ) -> Result<(), Halted> {
        let mut rest = span;
        loop {
            counters.attribute_calls.add(1);
            let told = self.kernel.convert_in_place(self.file, rest, attribute);
            let Err(stopped) = told else {
                return Ok(());
            };
            let reached = self.reached(rest, &stopped);
            if !patience.allows(stopped.call.errno) {
                let end = reached;
                return Err(Halted { end, stopped });
            }
            let held = stopped.call.errno == libc::EAGAIN;
            counters.retries.add(u64::from(held));
            if reached > rest.first() {
                counters.resumed.add(1);
                rest = Span::between(reached, rest.end());
            }
        }
    }

    /// Where the first huge page begins that has not converted; in a file of single pages, that is
    /// where `asked` begins.
    fn reached(&self, asked: Span<Offset>, stopped: &Stopped) -> u64 {
        match (stopped.at, self.huge_page) {
            (Some(at), Some(page)) if at < asked.end() => asked.first().max(at & !(page - 1)),
            _ => asked.first(),
        }
    }
}
