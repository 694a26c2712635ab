// SPDX-License-Identifier: MIT OR Apache-2.0
//! A legacy virtio disk driven through QEMU's test port, one request at a time.

use crate::failure::Failure;
use crate::ledger::PAGE;
use crate::test_port::TestPort;

/// PCI ids of a legacy disk, vendor low.
const IDS: u32 = 0x1001_1af4;
const PORTS: u64 = 0xc000;
/// Registers of a legacy device.
const FEATURES: u64 = PORTS + 4;
const QUEUE_PAGE: u64 = PORTS + 8;
const QUEUE_SIZE: u64 = PORTS + 12;
const QUEUE_SELECT: u64 = PORTS + 14;
const NOTIFY: u64 = PORTS + 16;
const STATUS: u64 = PORTS + 18;
const ACKNOWLEDGED: u64 = 1;
const DRIVER: u64 = 2;
const DRIVER_OK: u64 = 4;
const NEXT: u16 = 1;
const WRITABLE: u16 = 2;

/// A disk whose rings and request are in new, empty memory.
pub struct TestDisk {
    rings: u64,
    entries: u64,
    requests: u16,
}

impl TestDisk {
    /// Starts the disk with rings from this address on, below 4 GiB; the request follows them.
    pub fn start(port: &mut TestPort, rings: u64) -> Result<Self, Failure> {
        let slot = port.slot(IDS)?;
        port.enable(slot, PORTS as u32)?;
        port.port_out(STATUS, 1, 0)?;
        port.port_out(STATUS, 1, ACKNOWLEDGED | DRIVER)?;
        port.port_out(FEATURES, 4, 0)?;
        port.port_out(QUEUE_SELECT, 2, 0)?;
        let entries = port.port_in(QUEUE_SIZE, 2)?;
        port.port_out(QUEUE_PAGE, 4, rings / PAGE)?;
        port.port_out(STATUS, 1, ACKNOWLEDGED | DRIVER | DRIVER_OK)?;
        Ok(Self {
            rings,
            entries,
            requests: 0,
        })
    }

    fn available(&self) -> u64 {
        self.rings + self.entries * 16
    }

    fn used(&self) -> u64 {
        (self.available() + 6 + self.entries * 2).next_multiple_of(PAGE)
    }

    fn request(&self) -> u64 {
        (self.used() + 6 + self.entries * 8).next_multiple_of(PAGE)
    }

    /// Carries the page to the disk's first sectors, or from there.
    pub fn carry(&mut self, port: &mut TestPort, page: u64, to_disk: bool) -> Result<(), Failure> {
        let request = self.request();
        let status = request + 16;
        let mut header = [0; 17];
        header[0] = u8::from(to_disk);
        header[16] = 0xff;
        port.write(request, &header)?;
        let direction = if to_disk { 0 } else { WRITABLE };
        let buffers = [
            (request, 16, NEXT, 1),
            (page, PAGE as u32, NEXT | direction, 2),
            (status, 1u32, WRITABLE, 0u16),
        ];
        let descriptors: Vec<u8> = buffers
            .iter()
            .flat_map(|&(address, bytes, flags, next)| {
                let mut words = address.to_le_bytes().to_vec();
                words.extend(bytes.to_le_bytes());
                words.extend(flags.to_le_bytes());
                words.extend(next.to_le_bytes());
                words
            })
            .collect();
        port.write(self.rings, &descriptors)?;
        let slot = u64::from(self.requests) % self.entries;
        port.write(self.available() + 4 + slot * 2, &[0, 0])?;
        self.requests += 1;
        let count = self.requests.to_le_bytes();
        port.write(self.available() + 2, &count)?;
        port.port_out(NOTIFY, 2, 0)?;
        let used = self.used() + 2;
        port.wait(
            "the disk's request",
            |port| Ok(port.read(used, 2)? == count),
        )?;
        match port.read(status, 1)?.as_slice() {
            [0] => Ok(()),
            other => Err(Failure::new(format!("the disk's request fails: {other:?}"))),
        }
    }
}
