// SPDX-License-Identifier: MIT OR Apache-2.0
//! A QMP client: commands one at a time, events kept until somebody asks.

use crate::failure::{Attempt, Failure};
use crate::lines::Lines;
use serde_json::{json, Value};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Generous: under nested emulation a device that is plugged in maps memory for seconds.
const PATIENCE: Duration = Duration::from_secs(180);

/// A monitor connection in command mode.
pub struct Qmp {
    lines: Lines,
    events: VecDeque<Value>,
    next_id: u64,
}

/// What QEMU answers when it refuses a command.
#[derive(Debug)]
pub struct Refusal {
    pub class: String,
    pub description: String,
}

impl Qmp {
    /// Waits for the greeting and leaves negotiation mode.
    pub fn new(lines: Lines) -> Result<Self, Failure> {
        lines.find(PATIENCE, "QMP's greeting", |line| {
            line.contains("\"QMP\"").then_some(())
        })?;
        let mut qmp = Self {
            lines,
            events: VecDeque::new(),
            next_id: 1,
        };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Has the human monitor run a line, whatever it answers.
    pub fn human(&mut self, line: &str) -> Result<String, Failure> {
        let answer = self.execute("human-monitor-command", json!({"command-line": line}))?;
        answer
            .as_str()
            .map(String::from)
            .attempt(|| format!("`{line}` was not answered with text: {answer}"))
    }

    /// Runs a command that is to be refused; what QEMU said.
    pub fn refusal(&mut self, command: &str, arguments: Value) -> Result<String, Failure> {
        match self.try_execute(command, arguments)? {
            Ok(answer) => Err(Failure::new(format!(
                "QMP {command} was to be refused and answered {answer}"
            ))),
            Err(refusal) => Ok(refusal.description),
        }
    }

    /// Runs a command that is to succeed.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        self.try_execute(command, arguments)?.map_err(|refusal| {
            Failure::new(format!(
                "QMP {command}: {}: {}",
                refusal.class, refusal.description
            ))
        })
    }

    /// Runs a command that may be refused: the outer error is a broken connection.
    pub fn try_execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<Result<Value, Refusal>, Failure> {
        let id = self.next_id;
        self.next_id += 1;
        let request = json!({"execute": command, "arguments": arguments, "id": id});
        self.lines.send(&request.to_string())?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.message(deadline, command)?;
            if message["id"] == id {
                return Ok(reply(message));
            }
            self.events.push_back(message);
        }
    }

    /// The next event of this name, from now or from before.
    pub fn event(&mut self, name: &str, patience: Duration) -> Result<Value, Failure> {
        let deadline = Instant::now() + patience;
        loop {
            let at = self.events.iter().position(|event| event["event"] == name);
            if let Some(event) = at.and_then(|at| self.events.remove(at)) {
                return Ok(event);
            }
            let message = self.message(deadline, name)?;
            self.events.push_back(message);
        }
    }

    /// How many events of this name have come and not been taken.
    pub fn events_waiting(&self, name: &str) -> usize {
        self.events
            .iter()
            .filter(|event| event["event"] == name)
            .count()
    }

    fn message(&self, deadline: Instant, waiting_for: &str) -> Result<Value, Failure> {
        let line = self.lines.next(deadline, waiting_for)?;
        serde_json::from_str(&line)
            .attempt(|| format!("QMP sent something that is no JSON: {line}"))
    }
}

fn reply(mut message: Value) -> Result<Value, Refusal> {
    match message.get("error") {
        None => Ok(message["return"].take()),
        Some(error) => Err(Refusal {
            class: error["class"].as_str().unwrap_or_default().to_string(),
            description: error["desc"].as_str().unwrap_or_default().to_string(),
        }),
    }
}

/// What `query-gmem` said, with the numbers by name.
pub struct Gmem(Value);

impl Gmem {
    pub fn query(qmp: &mut Qmp) -> Result<Self, Failure> {
        qmp.execute("query-gmem", json!({})).map(Self)
    }

    /// A counter of the whole VM.
    pub fn total(&self, name: &str) -> Result<u64, Failure> {
        self.0[name]
            .as_u64()
            .attempt(|| format!("query-gmem has no number {name}: {}", self.0))
    }

    /// A number of each block, all together.
    pub fn sum(&self, name: &str) -> Result<u64, Failure> {
        self.0["blocks"]
            .as_array()
            .attempt(|| format!("query-gmem has no blocks: {}", self.0))?
            .iter()
            .map(|block| GmemBlock(block).number(name))
            .sum()
    }

    /// What is the case, without what looking or a while may change.
    pub fn books(&self) -> Value {
        let mut books = self.0.clone();
        for block in books["blocks"].as_array_mut().into_iter().flatten() {
            if let Some(block) = block.as_object_mut() {
                block.remove("access-refused");
                block.remove("double-bytes");
            }
        }
        books
    }

    /// One block.
    pub fn block(&self, id: &str) -> Result<GmemBlock<'_>, Failure> {
        self.0["blocks"]
            .as_array()
            .and_then(|blocks| blocks.iter().find(|block| block["id"] == id))
            .map(GmemBlock)
            .attempt(|| format!("query-gmem has no block {id}: {}", self.0))
    }
}

/// One block of `query-gmem`.
pub struct GmemBlock<'a>(&'a Value);

impl GmemBlock<'_> {
    pub fn number(&self, name: &str) -> Result<u64, Failure> {
        self.0[name]
            .as_u64()
            .attempt(|| format!("query-gmem's block has no number {name}: {}", self.0))
    }

    pub fn text(&self, name: &str) -> Result<&str, Failure> {
        self.0[name]
            .as_str()
            .attempt(|| format!("query-gmem's block has no string {name}: {}", self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::{Gmem, Qmp};
    use crate::lines::Lines;
    use serde_json::json;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    #[test]
    fn replies_find_their_command_and_events_wait() {
        let log = std::env::temp_dir().join(format!("gmem-qmp-{}", std::process::id()));
        let (far, near) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let mut writer = far.try_clone().unwrap();
            writeln!(writer, "{}", json!({"QMP": {}})).unwrap();
            for line in BufReader::new(far).lines() {
                let request: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
                writeln!(writer, "{}", json!({"event": "STOP"})).unwrap();
                let answer = match request["execute"].as_str() {
                    Some("migrate") => {
                        json!({"id": request["id"], "error": {"class": "GenericError", "desc": "no"}})
                    }
                    _ => json!({"id": request["id"], "return": {"status": "running"}}),
                };
                writeln!(writer, "{answer}").unwrap();
            }
        });
        let mut qmp = Qmp::new(Lines::new("test", near, &log).unwrap()).unwrap();
        let status = qmp.execute("query-status", json!({})).unwrap();
        assert_eq!(status["status"], "running");
        let refusal = qmp.try_execute("migrate", json!({})).unwrap().unwrap_err();
        assert_eq!(refusal.description, "no");
        assert_eq!(qmp.events_waiting("STOP"), 3);
        qmp.event("STOP", Duration::ZERO).unwrap();
        assert_eq!(qmp.events_waiting("STOP"), 2);
        drop(qmp);
        drop(server);
        std::fs::remove_file(&log).unwrap();
    }

    #[test]
    fn a_missing_number_is_an_error_and_not_zero() {
        let gmem = Gmem(json!({"requests": 3, "blocks": [{"id": "ram0", "size": 4096}]}));
        assert_eq!(gmem.total("requests").unwrap(), 3);
        assert_eq!(gmem.block("ram0").unwrap().number("size").unwrap(), 4096);
        assert!(gmem.total("failures").is_err());
        assert_eq!(gmem.sum("size").unwrap(), 4096);
        assert!(gmem.sum("private").is_err());
        assert!(gmem.block("ram1").is_err());
        assert!(gmem.block("ram0").unwrap().number("private").is_err());
    }
}
