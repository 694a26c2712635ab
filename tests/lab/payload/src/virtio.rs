// SPDX-License-Identifier: MIT OR Apache-2.0
//! Any virtio device on PCI (virtio 1.2, not a legacy one): queues wherever a request wants them, also where the host can't
//! read them, buffers as it names them. What the device answers is for the request to look at, and the memory of a request
//! in flight for it to convert.

use crate::commands::{ok, Answer, Results};
use crate::memory::{self, allowed, read, write, zero};
use crate::pci::Function;
use crate::platform::wait_until;
use crate::protocol::MAP_GPA_ENCRYPTED;
use core::ptr;

const VENDOR: u16 = 0x1af4;
/// PCI ids of devices that are not legacy: this and the number of their kind.
const FIRST_DEVICE: u64 = 0x1040;
/// Where its structures are, by vendor-specific capabilities: a type, a BAR, an offset in it.
const VENDOR_SPECIFIC: u32 = 0x09;
const COMMON: u32 = 1;
const NOTIFY: u32 = 2;

/// Offsets in the common structure.
const OFFERED_SELECT: u64 = 0x00;
const OFFERED: u64 = 0x04;
const ACCEPTED_SELECT: u64 = 0x08;
const ACCEPTED: u64 = 0x0c;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY: u64 = 0x1e;
const QUEUE_DESCRIPTORS: u64 = 0x20;
const QUEUE_AVAILABLE: u64 = 0x28;
const QUEUE_USED: u64 = 0x30;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
/// What every driver of such a device accepts: that it is not legacy, and that addresses are the platform's.
const VERSION_1: u64 = 1 << 32;
const ACCESS_PLATFORM: u64 = 1 << 33;
const NEXT: u64 = 1;
const PAGE: u64 = 4096;
const WORDS_PER_BUFFER: usize = 3;
/// So that rings take three pages at most.
const MOST_ENTRIES: u16 = 256;
const RESET_MILLISECONDS: u64 = 60_000;

/// A device's registers.
pub struct Virtio {
    common: u64,
    notify: u64,
    notify_stride: u64,
}

/// What a device has done with what it was offered.
pub struct Used {
    pub used: bool,
    /// The bytes that it says it wrote for the chain that it used last.
    pub written: u32,
}

/// Memory of a request that goes while the device is at it.
pub struct Withdrawal {
    pub count: u64,
    pub milliseconds: u64,
    pub address: u64,
    pub pages: u64,
    /// What the guest writes to it while it is private.
    pub seed: u64,
}

impl Virtio {
    /// The device of this kind that has `index` such before it.
    pub fn find(kind: u64, index: u64) -> Result<Self, &'static str> {
        let function = Function::find_nth(VENDOR, (FIRST_DEVICE + kind) as u16, index as usize)
            .ok_or("there is no such virtio device, or it is a legacy one")?;
        let (common, _) = structure(function, COMMON)?;
        let (notify, capability) = structure(function, NOTIFY)?;
        function.enable();
        Ok(Self {
            common,
            notify,
            notify_stride: u64::from(function.read(capability + 16)),
        })
    }

    /// Resets the device and accepts `features` of those that it offers, which are the answer.
    pub fn reset(&self, features: u64) -> Result<u64, &'static str> {
        self.write8(STATUS, 0);
        if !wait_until(RESET_MILLISECONDS, || self.status() == 0) {
            return Err("the virtio device does not reset");
        }
        self.write8(STATUS, ACKNOWLEDGE | DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            self.write32(OFFERED_SELECT, half);
            offered |= u64::from(self.read32(OFFERED)) << (32 * half);
        }
        let accepted = offered & (features | VERSION_1 | ACCESS_PLATFORM);
        for half in 0..2 {
            self.write32(ACCEPTED_SELECT, half);
            self.write32(ACCEPTED, (accepted >> (32 * half)) as u32);
        }
        self.write8(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        match self.status() & FEATURES_OK {
            0 => Err("the virtio device does not agree to these features"),
            _ => Ok(offered),
        }
    }

    /// Gives queue number `queue` empty rings at `rings`; its size.
    pub fn set_queue(&self, queue: u64, rings: u64) -> Result<u64, &'static str> {
        let most = self.select(queue)?.min(u64::from(MOST_ENTRIES));
        self.write16(QUEUE_SIZE, most as u16);
        let size = self.select(queue)?;
        allowed(rings, rings_bytes(size))?;
        zero(rings, rings_bytes(size));
        self.write64(QUEUE_DESCRIPTORS, rings);
        self.write64(QUEUE_AVAILABLE, rings + 16 * size);
        self.write64(QUEUE_USED, rings + used_ring(size));
        self.write16(QUEUE_ENABLE, 1);
        Ok(size)
    }

    /// Tells the device that it may begin.
    pub fn start(&self) {
        self.write8(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn select(&self, queue: u64) -> Result<u64, &'static str> {
        self.write16(QUEUE_SELECT, queue as u16);
        match self.read16(QUEUE_SIZE) {
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
        let notify = self.notify + self.notify_stride * u64::from(self.read16(QUEUE_NOTIFY));
        // SAFETY: a register inside the BAR, as the device says.
        unsafe { (notify as *mut u16).write_volatile(queue as u16) };
        Ok(before)
    }

    /// Offers a chain of buffers `depth` times with one kick, waits until the device has used them all, and that `count`
    /// times. The device needn't interrupt. Says whether it always did within so many milliseconds.
    pub fn serve(
        &self,
        queue: u64,
        rings: u64,
        (count, depth): (u64, u64),
        milliseconds: u64,
        buffers: &[u64],
    ) -> Result<bool, &'static str> {
        const NO_INTERRUPT: u16 = 1;
        const SPINS: u64 = 1 << 22;
        let size = self.select(queue)?;
        let chain = buffers.chunks_exact(WORDS_PER_BUFFER);
        let length = chain.len() as u64;
        let most = u64::from(MOST_ENTRIES);
        if length == 0 || depth == 0 || depth > most || length * depth > size {
            return Err("the queue has no room for that many chains");
        }
        allowed(rings, rings_bytes(size))?;
        for head in (0..depth).map(|number| number * length) {
            for (index, buffer) in (0..).zip(chain.clone()) {
                let &[address, bytes, flags] = buffer else {
                    return Err("a buffer is an address, a length and flags");
                };
                let next = if index + 1 < length { NEXT } else { 0 };
                let at = rings + 16 * (head + index);
                write(at, address);
                write(
                    at + 8,
                    bytes & 0xffff_ffff | (flags | next) << 32 | (head + index + 1) << 48,
                );
            }
        }
        let available = rings + 16 * size;
        let notify = self.notify + self.notify_stride * u64::from(self.read16(QUEUE_NOTIFY));
        let mut index = (read(available) >> 16) as u16;
        // SAFETY: the queue's available ring, which the request may touch; 2-byte aligned.
        unsafe { ptr::write_volatile(available as *mut u16, NO_INTERRUPT) };
        for _ in 0..count {
            for number in 0..depth {
                let slot = u64::from(index) % size;
                // SAFETY: as above.
                unsafe {
                    let at = (available + 4 + 2 * slot) as *mut u16;
                    ptr::write_volatile(at, (number * length) as u16);
                }
                index = index.wrapping_add(1);
            }
            // SAFETY: as above; the register is inside the BAR, as the device says.
            unsafe {
                ptr::write_volatile((available + 2) as *mut u16, index);
                (notify as *mut u16).write_volatile(queue as u16);
            }
            // The clock is a port of QEMU's, and whoever reads it keeps the device waiting.
            let soon = (0..SPINS).any(|_| {
                core::hint::spin_loop();
                used(rings, size) == index
            });
            if !soon && !wait_until(milliseconds, || used(rings, size) == index) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits until the device has used another number of chains than `before`.
    pub fn wait(
        &self,
        queue: u64,
        rings: u64,
        before: u64,
        milliseconds: u64,
    ) -> Result<Used, &'static str> {
        let size = self.select(queue)?;
        allowed(rings, rings_bytes(size))?;
        let used = wait_until(milliseconds, || u64::from(used(rings, size)) != before);
        let last = before % size;
        // SAFETY: the element lies in the used ring; 4-byte aligned.
        let written =
            unsafe { ptr::read_volatile((rings + used_ring(size) + 8 + 8 * last) as *const u32) };
        Ok(Used {
            used,
            written: if used { written } else { 0 },
        })
    }

    /// Offers a chain of buffers again and again, and turns memory private each time while the device is at it; shared again
    /// when it is done. Prints how often the device answered, how often it had done so when the memory was gone, and the
    /// results of the conversions.
    pub fn withdraw(
        &self,
        queue: u64,
        rings: u64,
        withdrawal: &Withdrawal,
        buffers: &[u64],
    ) -> Answer {
        let &Withdrawal { address, pages, .. } = withdrawal;
        let bytes = pages.checked_mul(PAGE).ok_or("that is too long")?;
        allowed(address, bytes)?;
        let size = self.select(queue)?;
        let mut results = Results::default();
        let (mut answered, mut early) = (0u64, 0u64);
        for _ in 0..withdrawal.count {
            let before = u64::from(self.offer(queue, rings, buffers)?);
            results.count(memory::convert(address, pages, MAP_GPA_ENCRYPTED))?;
            early += u64::from(u64::from(used(rings, size)) != before);
            memory::fill(address, bytes, withdrawal.seed);
            let end = self.wait(queue, rings, before, withdrawal.milliseconds)?;
            answered += u64::from(end.used);
            results.count(memory::convert(address, pages, 0))?;
        }
        ok(format_args!("{answered} {early}"))?;
        results.print();
        Ok(())
    }

    /// The device status register: bit 6 says that it gave up.
    pub fn status(&self) -> u8 {
        // SAFETY: a register inside the BAR, as the device says; mapped one to one.
        unsafe { ((self.common + STATUS) as *const u8).read_volatile() }
    }

    fn write8(&self, offset: u64, value: u8) {
        // SAFETY: as in status.
        unsafe { ((self.common + offset) as *mut u8).write_volatile(value) }
    }

    fn read16(&self, offset: u64) -> u16 {
        // SAFETY: as in status.
        unsafe { ((self.common + offset) as *const u16).read_volatile() }
    }

    fn write16(&self, offset: u64, value: u16) {
        // SAFETY: as in status.
        unsafe { ((self.common + offset) as *mut u16).write_volatile(value) }
    }

    fn read32(&self, offset: u64) -> u32 {
        // SAFETY: as in status.
        unsafe { ((self.common + offset) as *const u32).read_volatile() }
    }

    fn write32(&self, offset: u64, value: u32) {
        // SAFETY: as in status.
        unsafe { ((self.common + offset) as *mut u32).write_volatile(value) }
    }

    /// In halves, as the standard has it for these registers.
    fn write64(&self, offset: u64, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}

/// The address of a structure of that type, and the capability that tells of it.
fn structure(function: Function, kind: u32) -> Result<(u64, u32), &'static str> {
    let capability = function
        .capabilities(VENDOR_SPECIFIC)
        .find(|&capability| function.read(capability) >> 24 == kind)
        .ok_or("the virtio device does not say where its registers are")?;
    let bar = function
        .memory(function.read(capability + 4) & 0xff)
        .ok_or("the virtio device has no memory BAR within reach, and its bridge none to give")?;
    Ok((bar + u64::from(function.read(capability + 8)), capability))
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
