// SPDX-License-Identifier: MIT OR Apache-2.0
//! A debugger at QEMU's gdbstub: interrupts the guest, writes to its memory and lets it go on.

use crate::failure::{Attempt, Failure};
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The stub answers on QEMU's main thread.
const PATIENCE: Duration = Duration::from_secs(180);

/// What QEMU is started with so that a debugger can attach.
pub struct Socket {
    far: UnixStream,
    near: UnixStream,
}

/// A debugger that is attached.
pub struct Debugger {
    stream: UnixStream,
}

impl Socket {
    pub fn new() -> Result<Self, Failure> {
        let (near, far) = UnixStream::pair().attempt(|| "making a socket pair".into())?;
        Ok(Self { far, near })
    }

    /// The descriptor that QEMU is to inherit.
    pub fn descriptor(&self) -> i32 {
        self.far.as_raw_fd()
    }

    /// QEMU's arguments.
    pub fn arguments(&self) -> [String; 4] {
        [
            "-chardev".into(),
            format!("socket,id=debugger,fd={}", self.descriptor()),
            "-gdb".into(),
            "chardev:debugger".into(),
        ]
    }

    /// For a QEMU that has started. The guest runs until it is interrupted.
    pub fn debugger(self) -> Result<Debugger, Failure> {
        self.near
            .set_read_timeout(Some(PATIENCE))
            .attempt(|| "limiting the debugger's patience".into())?;
        Ok(Debugger { stream: self.near })
    }
}

impl Debugger {
    /// Stops the guest.
    pub fn interrupt(&mut self) -> Result<(), Failure> {
        self.send(&[3])?;
        match self.answer("an interrupt")? {
            answer if answer.starts_with(['S', 'T']) => Ok(()),
            answer => Err(Failure::new(format!("the debugger got {answer:?}"))),
        }
    }

    /// Lets the guest go on.
    pub fn go_on(&mut self) -> Result<(), Failure> {
        self.send(&packet("c"))
    }

    /// Whether bytes could be written where the guest, which must be stopped, sees this address.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<bool, Failure> {
        let mut request = format!("M{address:x},{:x}:", bytes.len());
        for byte in bytes {
            let _ = write!(request, "{byte:02x}");
        }
        match self.ask(&request)?.as_str() {
            "OK" => Ok(true),
            answer if answer.starts_with('E') => Ok(false),
            answer => Err(Failure::new(format!("the debugger got {answer:?}"))),
        }
    }

    fn ask(&mut self, request: &str) -> Result<String, Failure> {
        self.send(&packet(request))?;
        self.answer(request)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.stream
            .write_all(bytes)
            .attempt(|| "writing to QEMU's gdbstub".into())
    }

    fn answer(&mut self, request: &str) -> Result<String, Failure> {
        let mut next = || {
            let mut byte = [0];
            self.stream
                .read_exact(&mut byte)
                .attempt(|| format!("the debugger waits for the answer to {request}"))?;
            Ok::<u8, Failure>(byte[0])
        };
        // Acknowledgements come first.
        while next()? != b'$' {}
        let mut answer = Vec::new();
        loop {
            match next()? {
                b'#' => break,
                byte => answer.push(byte),
            }
        }
        let _checksum = [next()?, next()?];
        self.send(b"+")?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

fn packet(request: &str) -> Vec<u8> {
    let sum = request.bytes().fold(0u8, u8::wrapping_add);
    format!("${request}#{sum:02x}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::Debugger;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn answers_are_found_between_acknowledgements() {
        let (mut far, near) = UnixStream::pair().unwrap();
        far.write_all(b"$T02thread:p01.01;#00+$OK#9a+$E14#aa")
            .unwrap();
        let mut debugger = Debugger { stream: near };
        debugger.interrupt().unwrap();
        assert!(debugger.write(0x1000, &[0xab, 1]).unwrap());
        assert!(!debugger.write(0x2000, &[0]).unwrap());
        drop(debugger);
        let mut asked = String::new();
        far.read_to_string(&mut asked).unwrap();
        assert_eq!(asked, "\u{3}+$M1000,2:ab01#ca+$M2000,1:00#06+");
    }
}
