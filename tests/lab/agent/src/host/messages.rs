// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's messages since some moment, and the IOMMU faults among them.

use crate::failure::{Attempt, Failure};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

/// A reader that starts where the log ended when it was made.
pub struct Messages {
    file: File,
}

impl Messages {
    pub fn from_now() -> Result<Self, Failure> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .attempt(|| "opening /dev/kmsg".into())?;
        // SAFETY: lseek touches no memory; on this device SEEK_END means after the newest message.
        unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_END) };
        Ok(Self { file })
    }

    /// The first message that contains all of these words, waiting for it if need be.
    pub fn find(&mut self, words: &[&str], patience: Duration) -> Result<Option<String>, Failure> {
        let deadline = Instant::now() + patience;
        loop {
            while let Some(message) = self.next()? {
                if words.iter().all(|word| message.contains(word)) {
                    return Ok(Some(message));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut poll = libc::pollfd {
                fd: self.file.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one structure, which outlives the call.
            if unsafe { libc::poll(&mut poll, 1, left.as_millis() as i32) } == 0 {
                return Ok(None);
            }
        }
    }

    /// How many messages so far contain all of these words.
    pub fn count(&mut self, words: &[&str]) -> Result<u64, Failure> {
        let mut count = 0;
        while let Some(message) = self.next()? {
            count += u64::from(words.iter().all(|word| message.contains(word)));
        }
        Ok(count)
    }

    fn next(&mut self) -> Result<Option<String>, Failure> {
        let mut record = [0; 8192];
        loop {
            match self.file.read(&mut record) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    let message = text.split_once(';').map_or(&*text, |(_, message)| message);
                    return Ok(Some(message.lines().next().unwrap_or_default().to_string()));
                }
                // Messages were overwritten before we came to them; the next read goes on with the oldest.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(Failure::new(format!("reading /dev/kmsg: {error}"))),
            }
        }
    }
}
