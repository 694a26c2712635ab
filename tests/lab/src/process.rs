// SPDX-License-Identifier: MIT OR Apache-2.0
//! Child processes: output to a log file, lines to a callback, and none of them outlives the lab.

use crate::interrupt;
use anyhow::{anyhow, bail, Context, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a child may take to end after SIGTERM: make and ninja remove half-written files first.
const GRACE: Duration = Duration::from_secs(10);
const TAIL_LINES: usize = 15;

/// Where logs of child processes go; made when first used.
#[derive(Clone)]
pub struct Logs {
    folder: PathBuf,
}

impl Logs {
    pub fn new(folder: PathBuf) -> Logs {
        Logs { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    fn create(&self, name: &str) -> Result<(PathBuf, File)> {
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("can't create {}", self.folder.display()))?;
        let path = self.path(name);
        let file =
            File::create(&path).with_context(|| format!("can't write {}", path.display()))?;
        Ok((path, file))
    }

    /// Runs to the end; an error names the log and shows its tail.
    pub fn run(&self, name: &str, command: &mut Command) -> Result<()> {
        self.run_lines(name, command, |_| ())
    }

    /// As `run`, and hands every line of output over.
    pub fn run_lines(
        &self,
        name: &str,
        command: &mut Command,
        on_line: impl FnMut(&str),
    ) -> Result<()> {
        let (status, log) = self.run_status(name, command, on_line)?;
        if status.success() {
            return Ok(());
        }
        Err(anyhow!(
            "{} failed ({status}); the end of {}:\n{}",
            display_name(command),
            log.display(),
            indent(&tail(&log, TAIL_LINES))
        ))
    }

    /// As `run_lines`, but the caller judges the status. Returns the log's path too.
    pub fn run_status(
        &self,
        name: &str,
        command: &mut Command,
        on_line: impl FnMut(&str),
    ) -> Result<(ExitStatus, PathBuf)> {
        self.run_inner(name, command, on_line, true)
    }

    /// For what must not be cut off half-way (dpkg at work): a Ctrl-C takes effect afterwards.
    pub fn run_uninterrupted(
        &self,
        name: &str,
        command: &mut Command,
        on_line: impl FnMut(&str),
    ) -> Result<(ExitStatus, PathBuf)> {
        let ended = self.run_inner(name, command, on_line, false)?;
        interrupt::check()?;
        Ok(ended)
    }

    fn run_inner(
        &self,
        name: &str,
        command: &mut Command,
        mut on_line: impl FnMut(&str),
        interruptible: bool,
    ) -> Result<(ExitStatus, PathBuf)> {
        interrupt::check()?;
        let (path, mut log) = self.create(name)?;
        writeln!(log, "$ {command:?}")?;
        let (mut reader, writer) = std::io::pipe().context("can't create a pipe")?;
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        let mut child = spawn(command)?;
        // The command keeps copies of the pipe's write end: without this the read end never sees its end.
        command.stdout(Stdio::null()).stderr(Stdio::null());

        let mut pending = Vec::new();
        let mut buffer = [0u8; 16384];
        loop {
            if interruptible && interrupt::requested() {
                end(&mut child);
                interrupt::check()?;
            }
            if !readable(reader.as_raw_fd(), Duration::from_millis(200)) {
                continue;
            }
            let count = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).context("reading a child's output"),
            };
            log.write_all(&buffer[..count])?;
            pending.extend_from_slice(&buffer[..count]);
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                on_line(String::from_utf8_lossy(&line).trim_end());
            }
        }
        if !pending.is_empty() {
            on_line(&String::from_utf8_lossy(&pending));
        }
        Ok((child.wait().context("waiting for a child")?, path))
    }
}

/// The standard output of a quick command.
pub fn output(command: &mut Command) -> Result<String> {
    interrupt::check()?;
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("can't run {}", display_name(command)))?;
    if !output.status.success() {
        bail!(
            "{} failed ({}): {}",
            display_name(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a program can be started by its name.
pub fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Starts a child in a process group of its own that dies with the calling thread.
pub fn spawn(command: &mut Command) -> Result<Child> {
    command.process_group(0);
    die_with_parent(command);
    command
        .spawn()
        .with_context(|| format!("can't run {}", display_name(command)))
}

/// The child gets SIGTERM when the thread that starts it ends.
pub fn die_with_parent(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe and touches only the child.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Ends a child and its process group: asks first, insists after a while.
pub fn end(child: &mut Child) {
    signal_group(child, libc::SIGTERM);
    let start = Instant::now();
    while start.elapsed() < GRACE {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(Duration::from_millis(20)),
            _ => break,
        }
    }
    signal_group(child, libc::SIGKILL);
    let _ = child.wait();
}

fn signal_group(child: &Child, signal: libc::c_int) {
    if let Ok(group) = libc::pid_t::try_from(child.id()) {
        // SAFETY: the group was created for this child and its id is not reused while members live.
        unsafe { libc::killpg(group, signal) };
    }
}

/// Whether there is something to read (or an end to see) within `patience`.
pub fn readable(fd: i32, patience: Duration) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let millis = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut poll, 1, millis) > 0 }
}

/// The last lines of a file, without control characters that would upset a terminal.
pub fn tail(path: &Path, lines: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..]
        .iter()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>())
        .collect::<Vec<_>>()
        .join("\n")
}

fn indent(text: &str) -> String {
    text.lines()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

fn display_name(command: &Command) -> String {
    Path::new(command.get_program())
        .file_name()
        .unwrap_or(command.get_program())
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logs(name: &str) -> Logs {
        Logs::new(std::env::temp_dir().join(format!("gmem-lab-{name}-{}", std::process::id())))
    }

    #[test]
    fn lines_of_both_streams_arrive_and_are_logged() {
        let logs = logs("lines");
        let mut seen = Vec::new();
        logs.run_lines(
            "both",
            Command::new("sh").args(["-c", "echo one; echo two >&2; printf three"]),
            |line| seen.push(line.to_string()),
        )
        .unwrap();
        assert_eq!(seen, ["one", "two", "three"]);
        assert!(tail(&logs.path("both"), 1).contains("three"));
        std::fs::remove_dir_all(&logs.folder).unwrap();
    }

    #[test]
    fn a_failure_shows_the_end_of_the_log() {
        let logs = logs("fail");
        let error = logs
            .run("bad", Command::new("sh").args(["-c", "echo why; exit 3"]))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("why") && error.contains("bad.log"),
            "{error}"
        );
        std::fs::remove_dir_all(&logs.folder).unwrap();
    }
}
