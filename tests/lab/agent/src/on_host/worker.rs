// SPDX-License-Identifier: MIT OR Apache-2.0
//! One scenario in a process of its own: whatever becomes of it, who started it can end all of it and give back what it had.

use super::signals;
use crate::boot::CommandLine;
use crate::place::Host;
use crate::report::Report;
use crate::{place, scenario};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The word that makes this program a worker. Not for people.
pub const WORD: &str = "--worker";
/// What it is to know, which is not for everybody on the host to read, as command lines are.
const ORDERS: &str = "GMEM_HOST_ORDERS";
/// A scenario of the lab takes a minute there, where all is emulated.
const LIMIT: Duration = Duration::from_secs(900);
/// For the kernel to take a killed guest's memory and devices apart.
const END_PATIENCE: Duration = Duration::from_secs(60);

/// How a scenario ended.
#[derive(Debug, PartialEq)]
pub enum Ended {
    Passed(Map<String, Value>),
    Failed(Map<String, Value>, String),
    Interrupted,
}

/// The worker's own end: reports on its standard output, says all else on its standard error.
pub fn work(name: &str) -> Result<(), String> {
    let orders = std::env::var(ORDERS).map_err(|error| format!("{ORDERS}: {error}"))?;
    std::env::remove_var(ORDERS);
    let host = Host::from_json(&orders).map_err(|failure| failure.to_string())?;
    place::is_host(host);
    // SAFETY: numbers of our own descriptors only; the copy is nobody else's.
    let port = unsafe {
        let copy = libc::fcntl(1, libc::F_DUPFD_CLOEXEC, 3);
        if copy < 0 || libc::dup2(2, 1) < 0 {
            return Err(format!("no way to report: {}", io::Error::last_os_error()));
        }
        File::from_raw_fd(copy)
    };
    scenario::run(name, &Report::to(port), &CommandLine::empty());
    Ok(())
}

/// Runs one to its end, or to an interruption's or the limit's. Nothing of it is left then.
pub fn run(program: &Path, name: &str, host: &Host, progress: impl Fn(&str)) -> Ended {
    let log = host.work.join(format!("{name}.log"));
    match start(program, name, host, &log) {
        Ok(child) => follow(Group(child), LIMIT.mul_f64(host.patience), progress),
        Err(error) => Ended::Failed(Map::new(), format!("starting it: {error}")),
    }
}

fn start(program: &Path, name: &str, host: &Host, log: &Path) -> io::Result<Child> {
    let mut command = Command::new(program);
    command
        .args([WORD, name])
        .env(ORDERS, host.to_json().to_string())
        .env("TMPDIR", &host.work)
        .current_dir(&host.work)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(log)?);
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(|| {
            // A group of its own: the terminal's Ctrl-C reaches us alone, and one signal reaches all of it.
            if libc::setpgid(0, 0) != 0 || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    command.spawn()
}

/// A worker and what it started.
struct Group(Child);

impl Group {
    /// Ends what is left and waits until all of it is gone: until then it holds devices.
    fn end(&mut self) {
        let group = -(self.0.id() as libc::pid_t);
        // SAFETY: numbers only; the group is that of a child that was not waited for yet.
        unsafe { libc::kill(group, libc::SIGKILL) };
        let _ = self.0.wait();
        let deadline = Instant::now() + END_PATIENCE;
        // SAFETY: as above. Its children are ours after its end (PR_SET_CHILD_SUBREAPER); the loop ends when there are none.
        while unsafe { libc::waitpid(group, std::ptr::null_mut(), libc::WNOHANG) } >= 0
            && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.end();
    }
}

/// Orphans of the group become our children, so that their end can be waited for.
pub fn adopt_orphans() {
    // SAFETY: numbers only.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
}

fn follow(mut group: Group, limit: Duration, progress: impl Fn(&str)) -> Ended {
    let Some(mut pipe) = group.0.stdout.take() else {
        return Ended::Failed(Map::new(), "it has no output".into());
    };
    let deadline = Instant::now() + limit;
    let mut pending = Vec::new();
    loop {
        if signals::caught() {
            return Ended::Interrupted;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let seconds = limit.as_secs();
            return Ended::Failed(
                Map::new(),
                format!("no result within {seconds} s; --patience 3 waits three times as long"),
            );
        }
        let mut poll = libc::pollfd {
            fd: pipe.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one structure, which outlives the call. A signal makes it return; one that came just before costs a moment.
        if unsafe { libc::poll(&mut poll, 1, 200) } <= 0 {
            continue;
        }
        let mut bytes = [0; 4096];
        match pipe.read(&mut bytes) {
            Ok(count @ 1..) => pending.extend_from_slice(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            _ => {
                return Ended::Failed(
                    Map::new(),
                    format!("it ended without a result ({})", last_words(&mut group)),
                )
            }
        }
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            match event(&line) {
                Some(Event::Progress(text)) => progress(&text),
                Some(Event::Result(ended)) => return ended,
                None => {}
            }
        }
    }
}

fn last_words(group: &mut Group) -> String {
    match group.0.wait() {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

#[derive(Debug, PartialEq)]
enum Event {
    Progress(String),
    Result(Ended),
}

fn event(line: &[u8]) -> Option<Event> {
    let value: Value = serde_json::from_slice(line).ok()?;
    match value["type"].as_str()? {
        "progress" => Some(Event::Progress(value["text"].as_str()?.to_string())),
        "result" => {
            let facts = value["facts"].as_object().cloned().unwrap_or_default();
            let ended = match (value["ok"].as_bool()?, value["error"].as_str()) {
                (true, _) => Ended::Passed(facts),
                (false, error) => {
                    Ended::Failed(facts, error.unwrap_or("it gives no reason").to_string())
                }
            };
            Some(Event::Result(ended))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{event, follow, Ended, Event, Group};
    use serde_json::Map;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    fn group(script: &str) -> Group {
        let mut command = Command::new("sh");
        command
            .args(["-c", script])
            .stdout(Stdio::piped())
            .process_group(0);
        Group(command.spawn().unwrap())
    }

    #[test]
    fn a_result_is_passed_or_failed_with_its_sentence() {
        let line = br#"{"type":"result","ok":true,"facts":{"a":1},"error":null}"#;
        assert!(
            matches!(event(line), Some(Event::Result(Ended::Passed(facts))) if facts["a"] == 1)
        );
        let line = br#"{"type":"result","ok":false,"facts":{},"error":"does not hold: x"}"#;
        let failed = Ended::Failed(Map::new(), "does not hold: x".into());
        assert_eq!(event(line), Some(Event::Result(failed)));
        assert_eq!(event(b"no JSON"), None);
    }

    #[test]
    fn one_that_dies_or_hangs_has_failed_and_leaves_nothing() {
        let ended = follow(group("exit 3"), Duration::from_secs(60), |_| ());
        assert!(
            matches!(&ended, Ended::Failed(_, why) if why.contains("without a result")),
            "{ended:?}"
        );
        let hanging = group("sleep 600 & wait");
        let id = hanging.0.id() as libc::pid_t;
        let ended = follow(hanging, Duration::from_millis(300), |_| ());
        assert!(
            matches!(&ended, Ended::Failed(_, why) if why.contains("no result within")),
            "{ended:?}"
        );
        // SAFETY: asks only whether the group exists. Who adopted the sleeper may not have waited for it yet.
        let is_there = || unsafe { libc::kill(-id, 0) } == 0;
        while is_there() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
