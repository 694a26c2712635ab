// SPDX-License-Identifier: MIT OR Apache-2.0
//! Any legacy virtio device, driven by ports alone: queues wherever a request wants them, buffers as it names them. What
//! the device answers is for the request to look at, and the memory of a request in flight for it to convert.

use crate::memory::{allowed, read, write, zero};
use crate::pci::{Function, BAR0};
use crate::platform::wait_until;
use crate::port::{in16, in32, in8, out16, out32, out8};
use core::ptr;

const VENDOR: u16 = 0x1af4;
const HOST_FEATURES: u16 = 0;
const GUEST_FEATURES: u16 = 4;
const QUEUE_PAGE: u16 = 8;
const QUEUE_SIZE: u16 = 12;
const QUEUE_SELECT: u16 = 14;
const QUEUE_NOTIFY: u16 = 16;
const STATUS: u16 = 18;
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const NEXT: u64 = 1;
const PAGE: u64 = 4096;
const WORDS_PER_BUFFER: usize = 3;

/// A device's ports.
pub struct Virtio {
    ports: u16,
}

impl Virtio {
    /// The device with this PCI id that has `index` such before it.
    pub fn find(device: u64, index: u64) -> Result<Self, &'static str> {
        let function = Function::find_nth(VENDOR, device as u16, index as usize)
            .ok_or("there is no such legacy virtio device")?;
        let bar = function.read(BAR0);
        if bar & 1 == 0 || bar & !3 == 0 {
            return Err("the virtio device has no port BAR: is it a legacy one?");
        }
        function.enable();
        Ok(Self {
            ports: (bar & !3) as u16,
        })
    }

    /// Resets the device and accepts `features` of those that it offers, which are the answer.
    pub fn reset(&self, features: u64) -> u32 {
        out8(self.ports + STATUS, 0);
        out8(self.ports + STATUS, ACKNOWLEDGE);
        out8(self.ports + STATUS, ACKNOWLEDGE | DRIVER);
        let offered = in32(self.ports + HOST_FEATURES);
        out32(self.ports + GUEST_FEATURES, offered & features as u32);
        offered
    }

    /// Gives queue number `queue` empty rings at `rings`; its size.
    pub fn set_queue(&self, queue: u64, rings: u64) -> Result<u64, &'static str> {
        let size = self.select(queue)?;
        allowed(rings, rings_bytes(size))?;
        zero(rings, rings_bytes(size));
        out32(self.ports + QUEUE_PAGE, (rings / PAGE) as u32);
        Ok(size)
    }

    /// Tells the device that it may begin.
    pub fn start(&self) {
        out8(self.ports + STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    }

    fn select(&self, queue: u64) -> Result<u64, &'static str> {
        out16(self.ports + QUEUE_SELECT, queue as u16);
        match in16(self.ports + QUEUE_SIZE) {
            0 => Err("the device has no such queue"),
            size => Ok(u64::from(size)),
        }
    }

    /// Offers a chain of buffers, each of an address, a length and flags (2: the device writes), and kicks. The answer is
    /// how many the device had used before.
    pub fn offer(&self, queue: u64, rings: u64, buffers: &[u64]) -> Result<u16, &'static str> {
        let size = self.select(queue)?;
        let chain = buffers.chunks_exact(WORDS_PER_BUFFER);
        let count = chain.len() as u64;
        if count == 0 || count > size || !chain.remainder().is_empty() {
            return Err("a buffer is an address, a length and flags");
        }
        allowed(rings, rings_bytes(size))?;
        for (index, buffer) in (0..).zip(chain) {
            let &[address, bytes, flags] = buffer else {
                return Err("a buffer is an address, a length and flags");
            };
            let next = if index + 1 < count { NEXT } else { 0 };
            write(rings + 16 * index, address);
            write(
                rings + 16 * index + 8,
                bytes & 0xffff_ffff | (flags | next) << 32 | (index + 1) << 48,
            );
        }
        let available = rings + 16 * size;
        let before = used(rings, size);
        let index = (read(available) >> 16) as u16;
        // SAFETY: both lie in the queue's available ring, which the request may touch; 2-byte aligned.
        unsafe {
            ptr::write_volatile(
                (available + 4 + 2 * (u64::from(index) % size)) as *mut u16,
                0,
            );
            ptr::write_volatile((available + 2) as *mut u16, index.wrapping_add(1));
        }
        out16(self.ports + QUEUE_NOTIFY, queue as u16);
        Ok(before)
    }

    /// Waits until the device has used another number of chains than `before`; whether it has.
    pub fn wait(
        &self,
        queue: u64,
        rings: u64,
        before: u64,
        milliseconds: u64,
    ) -> Result<bool, &'static str> {
        let size = self.select(queue)?;
        allowed(rings, rings_bytes(size))?;
        Ok(wait_until(milliseconds, || {
            u64::from(used(rings, size)) != before
        }))
    }

    /// The device status register: bit 6 says that it gave up.
    pub fn status(&self) -> u8 {
        in8(self.ports + STATUS)
    }
}

fn used_ring(size: u64) -> u64 {
    (16 * size + 6 + 2 * size).next_multiple_of(PAGE)
}

fn used(rings: u64, size: u64) -> u16 {
    (read(rings + used_ring(size)) >> 16) as u16
}

/// What the rings of so many entries occupy, in whole pages.
pub fn rings_bytes(size: u64) -> u64 {
    (used_ring(size) + 6 + 8 * size).next_multiple_of(PAGE)
}
