// SPDX-License-Identifier: MIT OR Apache-2.0
//! Virtio devices of the payload's guest, none of them legacy ones: its own words for them, put into Rust.

use crate::failure::Failure;
use crate::ledger::PAGE;
use crate::monitor::{number, results, Monitor};
use std::time::Duration;

/// Kinds of devices.
pub const NET: u64 = 1;
pub const BLOCK: u64 = 2;
pub const RNG: u64 = 4;
pub const BALLOON: u64 = 5;
pub const SCSI: u64 = 8;

/// What the rings of a queue take at most.
pub const RINGS_BYTES: u64 = 3 * PAGE;

/// A part of a request, in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    pub address: u64,
    pub bytes: u64,
    pub device_writes: bool,
}

impl Buffer {
    pub fn read(address: u64, bytes: u64) -> Self {
        Self {
            address,
            bytes,
            device_writes: false,
        }
    }

    pub fn written(address: u64, bytes: u64) -> Self {
        Self {
            address,
            bytes,
            device_writes: true,
        }
    }
}

/// What became of a request that was offered.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// The bytes that the device says it wrote; None if it did not answer.
    pub written: Option<u64>,
    /// The device's status register; 0x40 is "needs a reset".
    pub status: u64,
}

/// Memory of a request that is turned private while the device is at it, again and again.
#[derive(Clone, Copy, Debug)]
pub struct Withdrawal {
    pub count: u64,
    pub address: u64,
    pub bytes: u64,
    /// What the guest writes there while it is private.
    pub seed: u64,
}

/// What became of requests whose memory was withdrawn.
#[derive(Debug)]
pub struct Withdrawn {
    /// Requests that were answered, and those of them whose memory was still there.
    pub answered: u64,
    pub early: u64,
    /// How often each result of the conversions came.
    pub results: Vec<(i64, u64)>,
}

/// A device with one queue of our interest.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// Its kind, and how many such are before it.
    pub kind: u64,
    pub index: u64,
    pub queue: u64,
    /// Where its rings are.
    pub rings: u64,
}

impl Device {
    fn words(&self) -> String {
        format!("{} {}", self.kind, self.index)
    }

    /// Resets it, and starts it with empty rings and none but these features; those that it offered.
    pub fn start(&self, monitor: &mut Monitor, features: u64) -> Result<u64, Failure> {
        self.start_with(monitor, features, &[])
    }

    /// As `start`, with more of its queues.
    pub fn start_with(
        &self,
        monitor: &mut Monitor,
        features: u64,
        more: &[Device],
    ) -> Result<u64, Failure> {
        let device = self.words();
        let offered = monitor.ask_number(&format!("virtio-reset {device} {features:#x}"))?;
        for Device { queue, rings, .. } in std::iter::once(self).chain(more) {
            monitor.ask(&format!("virtio-queue {device} {queue} {rings:#x}"))?;
        }
        monitor.ask(&format!("virtio-start {device}"))?;
        Ok(offered)
    }

    /// Resets it: it looks at its rings no more, which another one may have then.
    pub fn stop(&self, monitor: &mut Monitor) -> Result<(), Failure> {
        let device = self.words();
        monitor.ask(&format!("virtio-reset {device} 0")).map(|_| ())
    }

    /// Offers a request and kicks; to be given to `wait`.
    pub fn offer(&self, monitor: &mut Monitor, buffers: &[Buffer]) -> Result<u64, Failure> {
        let request = format!(
            "virtio-offer {} {} {:#x}{}",
            self.words(),
            self.queue,
            self.rings,
            words(buffers)
        );
        monitor.ask_number(&request)
    }

    /// Offers the same request again and again, so many times with one kick, and that so many times; the nanoseconds that
    /// it takes, by the guest's clock.
    pub fn serve(
        &self,
        monitor: &mut Monitor,
        (kicks, depth): (u64, u64),
        patience: Duration,
        buffers: &[Buffer],
    ) -> Result<u64, Failure> {
        let answer = monitor.ask(&format!(
            "virtio-serve {} {} {:#x} {kicks} {depth} {}{}",
            self.words(),
            self.queue,
            self.rings,
            patience.as_millis(),
            words(buffers)
        ))?;
        number(answer.get(1))
    }

    /// Whether the device has answered what was offered, in the time that it is given.
    pub fn wait(
        &self,
        monitor: &mut Monitor,
        offered: u64,
        patience: Duration,
    ) -> Result<bool, Failure> {
        let answer = self.answer(monitor, offered, patience)?;
        Ok(answer.written.is_some())
    }

    /// As `wait`, with all that the device says.
    pub fn answer(
        &self,
        monitor: &mut Monitor,
        offered: u64,
        patience: Duration,
    ) -> Result<Answer, Failure> {
        let words = monitor.ask(&format!(
            "virtio-wait {} {} {:#x} {offered} {}",
            self.words(),
            self.queue,
            self.rings,
            patience.as_millis()
        ))?;
        let written = number(words.get(2))?;
        let answered = words.first().is_some_and(|word| word == "used");
        Ok(Answer {
            written: answered.then_some(written),
            status: number(words.get(1))?,
        })
    }

    /// Offers the same request again and again, and withdraws memory each time.
    pub fn withdraw(
        &self,
        monitor: &mut Monitor,
        withdrawal: Withdrawal,
        buffers: &[Buffer],
        patience: Duration,
    ) -> Result<Withdrawn, Failure> {
        let Withdrawal {
            count,
            address,
            bytes,
            seed,
        } = withdrawal;
        let request = format!(
            "virtio-withdraw {} {} {:#x} {count} {} {address:#x} {} {seed}{}",
            self.words(),
            self.queue,
            self.rings,
            patience.as_millis(),
            bytes / PAGE,
            words(buffers)
        );
        let answer = monitor.ask(&request)?;
        Ok(Withdrawn {
            answered: number(answer.first())?,
            early: number(answer.get(1))?,
            results: results(answer.get(2..).unwrap_or_default())?,
        })
    }
}

/// As the payload wants them, each with a space in front.
fn words(buffers: &[Buffer]) -> String {
    let word = |buffer: &Buffer| {
        let flags = if buffer.device_writes { 2 } else { 0 };
        format!(" {:#x} {:#x} {flags}", buffer.address, buffer.bytes)
    };
    buffers.iter().map(word).collect()
}
