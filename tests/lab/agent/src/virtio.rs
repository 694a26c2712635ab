// SPDX-License-Identifier: MIT OR Apache-2.0
//! Legacy virtio devices of the payload's guest: its own words for them, put into Rust.

use crate::failure::Failure;
use crate::monitor::Monitor;
use std::time::Duration;

/// PCI ids of legacy devices.
pub const BLOCK: u64 = 0x1001;
pub const BALLOON: u64 = 0x1002;
pub const SCSI: u64 = 0x1004;

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

/// A device with one queue of our interest.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// PCI id, and how many such are before it.
    pub id: u64,
    pub index: u64,
    pub queue: u64,
    /// Where its rings are.
    pub rings: u64,
}

impl Device {
    fn words(&self) -> String {
        format!("{:#x} {}", self.id, self.index)
    }

    /// Resets it, and starts it with empty rings and none but these features; those that it offered.
    pub fn start(&self, monitor: &mut Monitor, features: u64) -> Result<u64, Failure> {
        let device = self.words();
        let offered = monitor.ask_number(&format!("virtio-reset {device} {features:#x}"))?;
        let (queue, rings) = (self.queue, self.rings);
        monitor.ask(&format!("virtio-queue {device} {queue} {rings:#x}"))?;
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
        let mut request = format!(
            "virtio-offer {} {} {:#x}",
            self.words(),
            self.queue,
            self.rings
        );
        for buffer in buffers {
            let flags = if buffer.device_writes { 2 } else { 0 };
            request += &format!(" {:#x} {:#x} {flags}", buffer.address, buffer.bytes);
        }
        monitor.ask_number(&request)
    }

    /// Whether the device has answered what was offered, in the time that it is given.
    pub fn wait(
        &self,
        monitor: &mut Monitor,
        offered: u64,
        patience: Duration,
    ) -> Result<bool, Failure> {
        let words = monitor.ask(&format!(
            "virtio-wait {} {} {:#x} {offered} {}",
            self.words(),
            self.queue,
            self.rings,
            patience.as_millis()
        ))?;
        Ok(words.first().is_some_and(|word| word == "used"))
    }
}
