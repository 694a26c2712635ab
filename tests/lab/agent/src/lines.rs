// SPDX-License-Identifier: MIT OR Apache-2.0
//! A socket as a stream of lines with deadlines; everything that came is kept in a log file beside the scenario.

use crate::failure::{Attempt, Failure};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// One end of a line-based conversation.
pub struct Lines {
    name: &'static str,
    writer: UnixStream,
    receiver: Receiver<String>,
    log: PathBuf,
}

impl Lines {
    /// Starts reading at once, so that nothing is lost and the other side never blocks on us.
    pub fn new(name: &'static str, stream: UnixStream, log: &Path) -> Result<Self, Failure> {
        let path = log.to_path_buf();
        let log = File::create(log).attempt(|| format!("creating {}", log.display()))?;
        let reader = stream
            .try_clone()
            .attempt(|| format!("duplicating the socket of {name}"))?;
        let (sender, receiver) = channel();
        thread::spawn(move || pump(reader, log, &sender));
        Ok(Self {
            name,
            writer: stream,
            receiver,
            log: path,
        })
    }

    pub fn send(&mut self, line: &str) -> Result<(), Failure> {
        self.writer
            .write_all(format!("{line}\n").as_bytes())
            .attempt(|| format!("writing to {}", self.name))
    }

    /// The next line; what was being waited for goes into the error.
    pub fn next(&self, deadline: Instant, waiting_for: &str) -> Result<String, Failure> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.receiver
            .recv_timeout(left)
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => Failure::new(format!(
                    "{}: no answer in time, waiting for {waiting_for}",
                    self.name
                )),
                RecvTimeoutError::Disconnected => Failure::new(format!(
                    "{}: the other side closed it, waiting for {waiting_for}",
                    self.name
                )),
            })
    }

    /// The first line for which `wanted` gives something; the others are only in the log.
    pub fn find<T>(
        &self,
        patience: Duration,
        waiting_for: &str,
        mut wanted: impl FnMut(&str) -> Option<T>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(found) = wanted(&self.next(deadline, waiting_for)?) {
                return Ok(found);
            }
        }
    }
}

impl Lines {
    /// Waits for a text that may be in the middle of a line which has no end yet, as a prompt is.
    pub fn find_part(
        &self,
        patience: Duration,
        waiting_for: &str,
        part: &str,
    ) -> Result<(), Failure> {
        const GLANCE: Duration = Duration::from_millis(50);
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            let log = std::fs::read(&self.log).unwrap_or_default();
            if String::from_utf8_lossy(&log).contains(part) {
                return Ok(());
            }
            match self.receiver.recv_timeout(GLANCE) {
                // The last that was written is looked at above.
                Err(RecvTimeoutError::Disconnected) => {
                    let log = std::fs::read(&self.log).unwrap_or_default();
                    if String::from_utf8_lossy(&log).contains(part) {
                        return Ok(());
                    }
                    return Err(Failure::new(format!(
                        "{}: the other side closed it, waiting for {waiting_for}",
                        self.name
                    )));
                }
                _ => continue,
            }
        }
        Err(Failure::new(format!(
            "{}: it did not come in time, waiting for {waiting_for}",
            self.name
        )))
    }
}

fn pump(mut reader: UnixStream, mut log: File, sender: &Sender<String>) {
    let mut line = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = reader.read(&mut bytes) {
        let _ = log.write_all(&bytes[..count]);
        for &byte in &bytes[..count] {
            match byte {
                b'\n' => {
                    let text = String::from_utf8_lossy(&line).trim_end().to_string();
                    line.clear();
                    if sender.send(text).is_err() {
                        return;
                    }
                }
                _ => line.push(byte),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Lines;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    #[test]
    fn lines_come_whole_and_the_end_is_told_from_silence() {
        let log = std::env::temp_dir().join(format!("gmem-lines-{}", std::process::id()));
        let (mut far, near) = UnixStream::pair().unwrap();
        let lines = Lines::new("test", near, &log).unwrap();
        far.write_all(b"noise\r\nhalf").unwrap();
        far.write_all(b" and half\n").unwrap();
        let patience = Duration::from_secs(10);
        let found = lines.find(patience, "it", |line| {
            line.strip_prefix("half").map(String::from)
        });
        assert_eq!(found.unwrap(), " and half");
        let silence = lines.find(Duration::ZERO, "it", |_| Some(())).unwrap_err();
        assert!(silence.to_string().contains("no answer in time"));
        drop(far);
        let closed = lines.find(patience, "it", |_| Some(())).unwrap_err();
        assert!(closed.to_string().contains("closed"));
        assert_eq!(std::fs::read(&log).unwrap(), b"noise\r\nhalf and half\n");
        std::fs::remove_file(&log).unwrap();
    }
}
