// SPDX-License-Identifier: MIT OR Apache-2.0
//! A machine whose guest never runs: QEMU's test port (`-qtest`) does to ports, memory and PCI configuration what its
//! processor would. Any machine type can be asked that way, without firmware or a program that knows it.

use crate::failure::{Attempt, Failure};
use crate::lines::Lines;
use crate::machine::{Machine, Surroundings};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// Command bits of PCI: decode ports, decode memory, be a bus master.
const COMMAND_ALL: u32 = 7;

/// A machine that stands still, and its port.
pub struct TestPort {
    pub machine: Machine,
    lines: Lines,
    /// Where PCI configuration is memory, as on machines without the ports 0xcf8 and 0xcfc.
    ecam: Option<u64>,
}

impl TestPort {
    /// Starts QEMU with these arguments, stopped before its first instruction.
    pub fn start(directory: &Path, arguments: &[&str], ecam: Option<u64>) -> Result<Self, Failure> {
        let (near, far) = UnixStream::pair().attempt(|| "making a socket pair".into())?;
        let chardev = format!("socket,id=test,fd={}", far.as_raw_fd());
        let mut all = vec!["-S", "-chardev", &chardev, "-qtest", "chardev:test"];
        all.extend(["-qtest-log", "none"]);
        all.extend(arguments);
        let surroundings = Surroundings {
            inherited: &[far.as_raw_fd()],
            ..Surroundings::default()
        };
        let (machine, _) = Machine::start_in(directory, &all, surroundings)?;
        drop(far);
        let lines = Lines::new("QEMU's test port", near, &directory.join("test-port.log"))?;
        Ok(Self {
            machine,
            lines,
            ecam,
        })
    }

    fn ask(&mut self, request: &str) -> Result<String, Failure> {
        self.lines.send(request)?;
        let answer = self.lines.next(Instant::now() + PATIENCE, request)?;
        match answer.strip_prefix("OK") {
            Some(rest) => Ok(rest.trim().to_string()),
            None => Err(Failure::new(format!("the test port: {request}: {answer}"))),
        }
    }

    fn number(&mut self, request: &str) -> Result<u64, Failure> {
        let answer = self.ask(request)?;
        let digits = answer.strip_prefix("0x").unwrap_or(&answer);
        u64::from_str_radix(digits, 16)
            .attempt(|| format!("the test port: no number: {request}: {answer}"))
    }

    /// Guest memory, as QEMU sees it.
    pub fn read(&mut self, address: u64, bytes: usize) -> Result<Vec<u8>, Failure> {
        let answer = self.ask(&format!("read {address:#x} {bytes:#x}"))?;
        let digits = answer.strip_prefix("0x").unwrap_or(&answer).as_bytes();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        digits
            .chunks(2)
            .map(byte)
            .collect::<Option<_>>()
            .attempt(|| format!("the test port gave no bytes: {answer}"))
    }

    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Failure> {
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.ask(&format!("write {address:#x} {:#x} 0x{digits}", bytes.len()))
            .map(|_| ())
    }

    pub fn read_u64(&mut self, address: u64) -> Result<u64, Failure> {
        self.number(&format!("readq {address:#x}"))
    }

    pub fn write_u64(&mut self, address: u64, value: u64) -> Result<(), Failure> {
        self.ask(&format!("writeq {address:#x} {value:#x}"))
            .map(|_| ())
    }

    /// A port of 1, 2 or 4 bytes.
    pub fn port_in(&mut self, port: u64, bytes: u64) -> Result<u64, Failure> {
        self.number(&format!("in{} {port:#x}", suffix(bytes)))
    }

    pub fn port_out(&mut self, port: u64, bytes: u64, value: u64) -> Result<(), Failure> {
        self.ask(&format!("out{} {port:#x} {value:#x}", suffix(bytes)))
            .map(|_| ())
    }

    /// A word of the configuration of function 0 of a slot on bus 0.
    pub fn configuration(&mut self, slot: u64, offset: u64) -> Result<u32, Failure> {
        let word = match self.ecam {
            Some(base) => self.number(&format!("readl {:#x}", base + (slot << 15) + offset))?,
            None => {
                self.port_out(0xcf8, 4, 0x8000_0000 | slot << 11 | offset)?;
                self.port_in(0xcfc, 4)?
            }
        };
        Ok(word as u32)
    }

    pub fn configure(&mut self, slot: u64, offset: u64, value: u32) -> Result<(), Failure> {
        if let Some(base) = self.ecam {
            let address = base + (slot << 15) + offset;
            return self
                .ask(&format!("writel {address:#x} {value:#x}"))
                .map(|_| ());
        }
        self.port_out(0xcf8, 4, 0x8000_0000 | slot << 11 | offset)?;
        self.port_out(0xcfc, 4, value.into())
    }

    /// The slot on bus 0 with a device of this vendor (low half) and kind.
    pub fn slot(&mut self, ids: u32) -> Result<u64, Failure> {
        for slot in 0..32 {
            if self.configuration(slot, 0)? == ids {
                return Ok(slot);
            }
        }
        Err(Failure::new(format!("there is no PCI device {ids:#x}")))
    }

    /// Puts the device's first BAR there and switches it on.
    pub fn enable(&mut self, slot: u64, address: u32) -> Result<(), Failure> {
        self.configure(slot, 0x10, address)?;
        self.configure(slot, 4, COMMAND_ALL)
    }

    /// Looks until `done`.
    pub fn wait(
        &mut self,
        what: &str,
        mut done: impl FnMut(&mut Self) -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        while !done(self)? {
            if Instant::now() > deadline {
                return Err(Failure::new(format!("not in time: {what}")));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

fn suffix(bytes: u64) -> char {
    match bytes {
        1 => 'b',
        2 => 'w',
        _ => 'l',
    }
}
