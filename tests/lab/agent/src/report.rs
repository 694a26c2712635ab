// SPDX-License-Identifier: MIT OR Apache-2.0
//! JSON lines for the machine outside: one per event, whole lines only.

use crate::failure::{Attempt, Failure};
use serde_json::{json, Map, Value};
use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// The report channel.
pub struct Report {
    port: RefCell<File>,
}

impl Report {
    pub fn open(path: &str) -> Result<Self, Failure> {
        let port = OpenOptions::new()
            .write(true)
            .open(path)
            .attempt(|| format!("opening {path}"))?;
        make_raw(&port);
        Ok(Self::to(port))
    }

    pub fn to(port: File) -> Self {
        Self {
            port: RefCell::new(port),
        }
    }

    pub fn start(&self, scenario: &str) {
        self.line(&json!({"type": "start", "scenario": scenario}));
    }

    pub fn progress(&self, scenario: &str, text: &str) {
        println!("agent: {scenario}: {text}");
        self.line(&json!({"type": "progress", "scenario": scenario, "text": text}));
    }

    pub fn result(
        &self,
        scenario: &str,
        took: Duration,
        facts: &Map<String, Value>,
        error: Option<&str>,
    ) {
        let seconds = (took.as_secs_f64() * 10.0).round() / 10.0;
        println!("agent: {scenario}: {}", error.unwrap_or("ok"));
        self.line(&json!({
            "type": "result", "scenario": scenario, "ok": error.is_none(),
            "seconds": seconds, "facts": facts, "error": error,
        }));
    }

    pub fn done(&self) {
        self.line(&json!({"type": "done"}));
        // SAFETY: plain ioctl on an open terminal; powering off with bytes still in the UART would lose them.
        unsafe { libc::tcdrain(self.port.borrow().as_raw_fd()) };
    }

    fn line(&self, value: &Value) {
        let mut text = value.to_string();
        text.push('\n');
        if let Err(error) = self.port.borrow_mut().write_all(text.as_bytes()) {
            eprintln!("agent: cannot report ({error}): {text}");
        }
    }
}

/// A terminal would turn each newline into two characters and echo what the other side sends.
fn make_raw(port: &File) {
    // SAFETY: termios is plain data and both calls only touch it and the open descriptor.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(port.as_raw_fd(), &mut settings) == 0 {
            libc::cfmakeraw(&mut settings);
            libc::tcsetattr(port.as_raw_fd(), libc::TCSANOW, &settings);
        }
    }
}
