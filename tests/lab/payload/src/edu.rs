// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's `edu` device: a DMA engine between guest memory and a 4 KiB buffer of its own.

use crate::pci::Function;
use crate::platform::wait_until;

const VENDOR: u16 = 0x1234;
const DEVICE: u16 = 0x11e8;
const DMA_SOURCE: u64 = 0x80;
const DMA_TARGET: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
const RUN: u64 = 1;
const TO_MEMORY: u64 = 2;
/// Where the device's own buffer lies in its own address space.
const BUFFER: u64 = 0x40000;
const BUFFER_BYTES: u64 = 4096;
/// Looks at a register until a device without a delay is done; each is an access to an emulated device.
const MOST_LOOKS: u32 = 1_000_000;
/// The device takes 100 ms; a loaded lab stretches that.
const PATIENCE_MILLISECONDS: u64 = 60_000;

/// The device, ready for DMA.
pub struct Edu {
    registers: u64,
}

impl Edu {
    /// Finds the device that has `index` of its kind before it, and switches it on.
    pub fn find(index: u64) -> Result<Edu, &'static str> {
        let function = Function::find_nth(VENDOR, DEVICE, index as usize)
            .ok_or("there are not that many edu devices")?;
        let registers = function
            .memory(0)
            .ok_or("the edu device has no memory BAR, and its bridge none to give")?;
        function.enable();
        Ok(Edu { registers })
    }

    /// Where its registers are.
    pub fn registers(&self) -> u64 {
        self.registers
    }

    /// Copies guest memory into the device's buffer.
    pub fn load(&self, address: u64, bytes: u64) -> Result<(), &'static str> {
        self.run(address, BUFFER, bytes, RUN)
    }

    /// Copies the device's buffer into guest memory.
    pub fn store(&self, address: u64, bytes: u64) -> Result<(), &'static str> {
        self.run(BUFFER, address, bytes, RUN | TO_MEMORY)
    }

    /// The device whose registers are there, switched on before.
    pub fn at(registers: u64) -> Edu {
        Edu { registers }
    }

    /// As `load`, on a device that takes no time: no timer is read, which would be an exit. Whether it finished.
    pub fn load_at_once(&self, address: u64, bytes: u64) -> bool {
        self.start(address, BUFFER, bytes, RUN).is_ok() && self.finishes()
    }

    /// As `store`, likewise.
    pub fn store_at_once(&self, address: u64, bytes: u64) -> bool {
        self.start(BUFFER, address, bytes, RUN | TO_MEMORY).is_ok() && self.finishes()
    }

    fn finishes(&self) -> bool {
        (0..MOST_LOOKS).any(|_| !self.busy())
    }

    /// Begins to copy the device's buffer into guest memory: it happens 100 ms later.
    pub fn start_store(&self, address: u64, bytes: u64) -> Result<(), &'static str> {
        self.start(BUFFER, address, bytes, RUN | TO_MEMORY)
    }

    /// Whether what was begun has not happened yet.
    pub fn busy(&self) -> bool {
        self.read(DMA_COMMAND) & RUN != 0
    }

    fn run(&self, source: u64, target: u64, bytes: u64, command: u64) -> Result<(), &'static str> {
        self.start(source, target, bytes, command)?;
        match wait_until(PATIENCE_MILLISECONDS, || !self.busy()) {
            true => Ok(()),
            false => Err("the edu device did not finish"),
        }
    }

    fn start(
        &self,
        source: u64,
        target: u64,
        bytes: u64,
        command: u64,
    ) -> Result<(), &'static str> {
        if bytes > BUFFER_BYTES {
            return Err("the edu device's buffer has 4096 bytes");
        }
        self.write(DMA_SOURCE, source);
        self.write(DMA_TARGET, target);
        self.write(DMA_COUNT, bytes);
        self.write(DMA_COMMAND, command);
        Ok(())
    }

    fn read(&self, offset: u64) -> u64 {
        // SAFETY: a register inside the BAR that the firmware assigned; mapped one to one below 4 GiB.
        unsafe { ((self.registers + offset) as *const u64).read_volatile() }
    }

    fn write(&self, offset: u64, value: u64) {
        // SAFETY: as in read.
        unsafe { ((self.registers + offset) as *mut u64).write_volatile(value) }
    }
}
