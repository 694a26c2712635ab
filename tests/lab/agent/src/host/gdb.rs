// SPDX-License-Identifier: MIT OR Apache-2.0
//! A debugger on QEMU's gdbstub: as much of the remote protocol as reading, writing and breakpoints take.

use crate::failure::{Attempt, Failure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// A debugger. The guest stands still from its connection until `detach`.
pub struct Debugger {
    stream: UnixStream,
}

impl Debugger {
    pub fn attach(socket: &Path) -> Result<Self, Failure> {
        let stream = UnixStream::connect(socket)
            .attempt(|| format!("connecting to the gdbstub at {}", socket.display()))?;
        stream
            .set_read_timeout(Some(PATIENCE))
            .attempt(|| "giving the gdbstub a deadline".into())?;
        let mut debugger = Self { stream };
        debugger.ask("?")?;
        Ok(debugger)
    }

    /// The eight bytes at an address, or the stub's error.
    pub fn read(&mut self, address: u64) -> Result<Result<u64, String>, Failure> {
        let answer = self.ask(&format!("m{address:x},8"))?;
        if answer.len() != 16 {
            return Ok(Err(answer));
        }
        u64::from_str_radix(&answer, 16)
            .map(|value| Ok(value.swap_bytes()))
            .attempt(|| format!("the gdbstub read something that is no number: {answer}"))
    }

    /// Writes eight bytes; what the stub says.
    pub fn write(&mut self, address: u64, value: u64) -> Result<String, Failure> {
        self.ask(&format!("M{address:x},8:{:016x}", value.swap_bytes()))
    }

    /// A breakpoint in memory: the stub writes an instruction there.
    pub fn set_breakpoint(&mut self, address: u64) -> Result<String, Failure> {
        self.ask(&format!("Z0,{address:x},1"))
    }

    /// Whether addresses are physical from now on.
    pub fn physical(&mut self, physical: bool) -> Result<String, Failure> {
        self.ask(&format!("Qqemu.PhyMemMode:{}", u8::from(physical)))
    }

    /// Lets the guest go on.
    pub fn detach(mut self) -> Result<(), Failure> {
        self.ask("D").map(|_| ())
    }

    fn ask(&mut self, request: &str) -> Result<String, Failure> {
        let packet = format!("${request}#{:02x}", sum(request.as_bytes()));
        self.stream
            .write_all(packet.as_bytes())
            .attempt(|| format!("sending {request} to the gdbstub"))?;
        let what = || format!("waiting for the gdbstub to answer {request}");
        let mut answer = Vec::new();
        while self.byte().attempt(what)? != b'$' {}
        loop {
            match self.byte().attempt(what)? {
                b'#' => break,
                byte => answer.push(byte),
            }
        }
        for _ in 0..2 {
            self.byte().attempt(what)?;
        }
        self.stream.write_all(b"+").attempt(what)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    fn byte(&mut self) -> std::io::Result<u8> {
        let mut byte = [0];
        self.stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}
