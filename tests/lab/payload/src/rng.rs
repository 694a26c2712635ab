// SPDX-License-Identifier: MIT OR Apache-2.0
//! A legacy virtio-rng device, driven by ports alone, with a queue wherever the request wants it: also where the host
//! can't read it.

use crate::memory::{read, write, zero};
use crate::pci::{Function, BAR0};
use crate::platform::wait_until;
use crate::port::{in16, in8, out16, out32, out8};
use core::ptr;

const VENDOR: u16 = 0x1af4;
const DEVICE: u16 = 0x1005;
const GUEST_FEATURES: u16 = 4;
const QUEUE_PAGE: u16 = 8;
const QUEUE_SIZE: u16 = 12;
const QUEUE_SELECT: u16 = 14;
const QUEUE_NOTIFY: u16 = 16;
const STATUS: u16 = 18;
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const DEVICE_WRITES: u64 = 2;
const PAGE: u64 = 4096;

/// The device's ports.
pub struct Rng {
    ports: u16,
}

impl Rng {
    /// Finds the device and switches it on.
    pub fn find() -> Result<Rng, &'static str> {
        let function = Function::find(VENDOR, DEVICE)
            .ok_or("there is no legacy virtio-rng device on bus 0")?;
        let bar = function.read(BAR0);
        if bar & 1 == 0 || bar & !3 == 0 {
            return Err("the virtio-rng device has no port BAR: is it a legacy one?");
        }
        function.enable();
        Ok(Rng {
            ports: (bar & !3) as u16,
        })
    }

    /// Resets the device and gives it an empty queue at `queue`; the queue's size.
    pub fn setup(&self, queue: u64) -> u16 {
        out8(self.ports + STATUS, 0);
        out8(self.ports + STATUS, ACKNOWLEDGE);
        out8(self.ports + STATUS, ACKNOWLEDGE | DRIVER);
        out32(self.ports + GUEST_FEATURES, 0);
        out16(self.ports + QUEUE_SELECT, 0);
        let size = in16(self.ports + QUEUE_SIZE);
        zero(queue, queue_bytes(size));
        out32(self.ports + QUEUE_PAGE, (queue / PAGE) as u32);
        out8(self.ports + STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
        size
    }

    /// Offers one buffer and kicks; the bytes that the device says it wrote, None if it stayed silent.
    pub fn kick(&self, queue: u64, buffer: u64, bytes: u64, milliseconds: u64) -> Option<u32> {
        out16(self.ports + QUEUE_SELECT, 0);
        let size = u64::from(in16(self.ports + QUEUE_SIZE));
        let available = queue + 16 * size;
        let used = used_ring(queue, size);
        write(queue, buffer);
        write(queue + 8, bytes | DEVICE_WRITES << 32);
        let index = (read(available) >> 16) as u16;
        let before = (read(used) >> 16) as u16;
        // SAFETY: both lie in the queue's available ring, which the request may touch; 2-byte aligned.
        unsafe {
            ptr::write_volatile(
                (available + 4 + 2 * (u64::from(index) % size)) as *mut u16,
                0,
            );
            ptr::write_volatile((available + 2) as *mut u16, index.wrapping_add(1));
        }
        out16(self.ports + QUEUE_NOTIFY, 0);
        let answered = wait_until(milliseconds, || (read(used) >> 16) as u16 != before);
        // SAFETY: the element lies in the used ring; 4-byte aligned.
        answered.then(|| unsafe {
            ptr::read_volatile((used + 4 + 8 * (u64::from(before) % size) + 4) as *const u32)
        })
    }

    /// The device status register: bit 6 says that it gave up.
    pub fn status(&self) -> u8 {
        in8(self.ports + STATUS)
    }
}

fn used_ring(queue: u64, size: u64) -> u64 {
    (queue + 16 * size + 6 + 2 * size).next_multiple_of(PAGE)
}

/// What a queue of this many entries occupies, in whole pages.
pub fn queue_bytes(size: u16) -> u64 {
    let size = u64::from(size);
    (used_ring(0, size) + 6 + 8 * size).next_multiple_of(PAGE)
}
