// SPDX-License-Identifier: MIT OR Apache-2.0
//! The report: what is sent, as JSON for programs and as text for people. No absolute times, no names of the host's owner.

use serde_json::{json, Map, Value};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// How one scenario went.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub result: Verdict,
    pub facts: Map<String, Value>,
}

/// All of it.
pub struct Contents {
    pub versions: Value,
    pub host: Value,
    pub host_lines: Vec<String>,
    pub devices: Vec<Value>,
    pub rows: Vec<Row>,
    pub interrupted: bool,
    /// What of the host is not as it was, in sentences.
    pub left: Vec<String>,
    /// What else is not as it was, by name: a host has a life of its own.
    pub differs: Vec<String>,
}

/// Both files, which are new and ours.
pub struct Files {
    json: (PathBuf, File),
    text: (PathBuf, File),
    log: (PathBuf, File),
}

impl Files {
    /// Makes them now, so that nobody waits for a report that can't be written.
    pub fn create(path: &Path) -> Result<Self, String> {
        let one = |ending: &str| -> Result<(PathBuf, File), String> {
            let mut name = path.as_os_str().to_owned();
            name.push(ending);
            let path = PathBuf::from(name);
            let file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(&path)
                .map_err(|error| match error.kind() {
                    io::ErrorKind::AlreadyExists => format!(
                        "{} exists: move it away, or choose another name with --report",
                        path.display()
                    ),
                    _ => format!(
                        "{}: {error}; choose another place with --report",
                        path.display()
                    ),
                })?;
            Ok((path, file))
        };
        let mut made: Vec<(PathBuf, File)> = Vec::new();
        for ending in [".json", ".txt", ".log"] {
            match one(ending) {
                Ok(file) => made.push(file),
                Err(error) => {
                    for (path, _) in made {
                        let _ = std::fs::remove_file(path);
                    }
                    return Err(error);
                }
            }
        }
        let (Some(log), Some(text), Some(json)) = (made.pop(), made.pop(), made.pop()) else {
            return Err("a report without its files".into());
        };
        let mut files = Self { json, text, log };
        files.reserve().inspect_err(|_| files.remove())?;
        Ok(files)
    }

    /// As much room as a report takes is there: it is written over at the end.
    fn reserve(&mut self) -> Result<(), String> {
        const BYTES: usize = 256 << 10;
        for (path, file) in [&mut self.json, &mut self.text] {
            file.write_all(&vec![b'\n'; BYTES])
                .and_then(|()| file.sync_all())
                .map_err(|error| {
                    format!(
                        "{}: {error}; choose another place with --report",
                        path.display()
                    )
                })?;
        }
        Ok(())
    }

    fn remove(&self) {
        for (path, _) in [&self.json, &self.text, &self.log] {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Nothing was run: there is nothing to report.
    pub fn discard(self) {
        self.remove();
    }

    /// `logs`: empty where they are of no use.
    pub fn write(mut self, contents: &Contents, logs: &[u8]) -> Result<Vec<PathBuf>, String> {
        let json = format!("{:#}\n", contents.to_json());
        let mut written = Vec::new();
        for ((path, file), text) in [(&mut self.json, json), (&mut self.text, contents.to_text())] {
            file.seek(SeekFrom::Start(0))
                .and_then(|_| file.write_all(text.as_bytes()))
                .and_then(|()| file.set_len(text.len() as u64))
                .map_err(|error| format!("{}: {error}", path.display()))?;
            written.push(path.clone());
        }
        match logs {
            [] => {
                let _ = std::fs::remove_file(&self.log.0);
            }
            logs => {
                // Best effort: the report has the sentences.
                let _ = self.log.1.write_all(logs);
                written.push(self.log.0);
            }
        }
        Ok(written)
    }
}

impl Contents {
    pub fn count(&self, is: impl Fn(&Verdict) -> bool) -> usize {
        self.rows.iter().filter(|row| is(&row.result)).count()
    }

    pub fn passed(&self) -> usize {
        self.count(|result| *result == Verdict::Passed)
    }

    pub fn failed(&self) -> usize {
        self.count(|result| matches!(result, Verdict::Failed(_)))
    }

    pub fn skipped(&self) -> usize {
        self.count(|result| matches!(result, Verdict::Skipped(_)))
    }

    /// The program's exit status. What is left changed is said before all else.
    pub fn status(&self) -> u8 {
        let ours = self.rows.iter().filter(|row| row.result == Verdict::Passed);
        match () {
            () if !self.left.is_empty() => 1,
            () if self.interrupted => super::INTERRUPTED,
            () if self.failed() > 0 => 1,
            // A stock guest says nothing of ours.
            () if ours.filter(|row| row.name != super::BASELINE).count() == 0 => super::COULD_NOT,
            () => 0,
        }
    }

    pub fn to_json(&self) -> Value {
        let rows: Vec<Value> = self.rows.iter().map(|row| {
            let (result, sentence) = row.result.words();
            json!({"name": row.name, "result": result, "sentence": sentence, "facts": without_times(&row.facts)})
        }).collect();
        json!({
            "report": "gmem-host", "format": 1, "versions": self.versions, "host": self.host, "devices": self.devices,
            "scenarios": rows, "passed": self.passed(), "failed": self.failed(), "skipped": self.skipped(),
            "interrupted": self.interrupted, "left_changed": self.left, "differs": self.differs,
        })
    }

    pub fn to_text(&self) -> String {
        let mut text = String::from("gmem on this host\n\n");
        for line in &self.host_lines {
            text += &format!("    {line}\n");
        }
        text += "\n";
        for device in &self.devices {
            text += &format!(
                "device {}: {}\n",
                device["address"].as_str().unwrap_or("?"),
                match device["given_back"] == true {
                    true => "taken, given back",
                    false => "taken, NOT given back",
                }
            );
        }
        for row in &self.rows {
            let (result, sentence) = row.result.words();
            text += &format!(
                "{:<24} {:<8} {}\n",
                row.name,
                result,
                sentence.unwrap_or_default()
            );
            if let Some(ratios) = row.facts.get("ratios").and_then(Value::as_object) {
                for (what, ratio) in ratios {
                    text += &format!(
                        "    {what}: {} times memory-backend-memfd (from {} to {})\n",
                        ratio["median"], ratio["lowest"], ratio["highest"]
                    );
                }
            }
        }
        text += &format!(
            "\n{} passed, {} failed, {} skipped{}\n",
            self.passed(),
            self.failed(),
            self.skipped(),
            if self.interrupted {
                ", interrupted"
            } else {
                ""
            }
        );
        match self.left.as_slice() {
            [] if self.differs.is_empty() => text += "The host is as it was.\n",
            [] => {
                text += &format!(
                    "Devices are as they were. Meanwhile, by this program's fault or somebody else's doing, these changed: {}.\n",
                    self.differs.join(", ")
                )
            }
            left => {
                for sentence in left {
                    text += &format!("NOT as it was: {sentence}\n");
                }
            }
        }
        text
    }
}

impl Verdict {
    pub fn words(&self) -> (&'static str, Option<&str>) {
        match self {
            Self::Passed => ("passed", None),
            Self::Failed(sentence) => ("failed", Some(sentence)),
            Self::Skipped(reason) => ("skipped", Some(reason)),
        }
    }
}

/// What was measured, without what says how fast somebody's machine is.
pub fn without_times(facts: &Map<String, Value>) -> Map<String, Value> {
    let is_time = |name: &str| {
        let name = name.to_ascii_lowercase();
        ["second", "_ns", "-ns", "_ms", "-ms", "cycles"]
            .iter()
            .any(|part| name.contains(part))
    };
    let clean = |value: &Value| match value {
        Value::Object(inner) => Value::Object(without_times(inner)),
        other => other.clone(),
    };
    facts
        .iter()
        .filter(|(name, _)| !is_time(name))
        .map(|(name, value)| (name.clone(), clean(value)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents() -> Contents {
        let row = |name: &str, result| Row {
            name: name.into(),
            result,
            facts: Map::new(),
        };
        let mut timings = row("timings", Verdict::Passed);
        timings.facts.insert(
            "ratios".into(),
            json!({"start": {"median": 1.02, "lowest": 0.9, "highest": 1.2}}),
        );
        Contents {
            versions: json!({}),
            host: json!({"kernel": "6.18"}),
            host_lines: vec!["kernel 6.18".into()],
            devices: vec![json!({"address": "0000:01:00.0", "given_back": false})],
            rows: vec![
                timings,
                row("dump", Verdict::Failed("does not hold: x".into())),
                row("cut", Verdict::Skipped("lab".into())),
            ],
            interrupted: true,
            left: vec!["0000:01:00.0".into()],
            differs: Vec::new(),
        }
    }

    #[test]
    fn text_and_json_say_the_same() {
        let contents = contents();
        let text = contents.to_text();
        for part in [
            "start: 1.02 times",
            "does not hold: x",
            "1 passed, 1 failed, 1 skipped, interrupted",
            "NOT given back",
            "NOT as it was",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let json = contents.to_json();
        assert_eq!(json["scenarios"][1]["sentence"], "does not hold: x");
        assert_eq!(
            (json["passed"].as_u64(), json["interrupted"].as_bool()),
            (Some(1), Some(true))
        );
    }

    #[test]
    fn the_status_says_the_worst() {
        let mut contents = contents();
        assert_eq!(contents.status(), 1, "what is left comes first");
        contents.left.clear();
        assert_eq!(contents.status(), 130);
        contents.interrupted = false;
        assert_eq!(contents.status(), 1);
        contents.rows.remove(1);
        contents.differs.push("modules".into());
        assert_eq!(contents.status(), 0, "a host has a life of its own");
        contents.rows[0].name = "stock-linux".into();
        assert_eq!(contents.status(), 2, "nothing of ours was run");
    }

    #[test]
    fn absolute_times_are_left_out() {
        let facts = json!({"convert_ns_max": 5, "sleeps_milliseconds": 9, "inner": {"seconds": 1, "pages": 2}, "ratios": 1});
        let kept = Value::Object(without_times(facts.as_object().unwrap()));
        assert_eq!(kept, json!({"inner": {"pages": 2}, "ratios": 1}));
    }

    #[test]
    fn a_report_that_is_there_is_left_alone() {
        let folder = std::env::temp_dir().join(format!("gmem-written-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("report.x");
        std::fs::write(folder.join("report.x.txt"), "old").unwrap();
        let refusal = Files::create(&path).err().unwrap();
        assert!(refusal.contains("report.x.txt exists"), "{refusal}");
        assert!(!folder.join("report.x.json").exists());
        std::fs::remove_file(folder.join("report.x.txt")).unwrap();
        std::os::unix::fs::symlink("/dev/null", folder.join("report.x.log")).unwrap();
        let refusal = Files::create(&path).err().unwrap();
        assert!(refusal.contains("report.x.log exists"), "{refusal}");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        std::fs::remove_file(folder.join("report.x.log")).unwrap();
        let written = Files::create(&path)
            .unwrap()
            .write(&contents(), b"")
            .unwrap();
        assert!(std::fs::read_to_string(&written[1])
            .unwrap()
            .ends_with("NOT as it was: 0000:01:00.0\n"));
        serde_json::from_slice::<Value>(&std::fs::read(&written[0]).unwrap()).unwrap();
        Files::create(&folder.join("other")).unwrap().discard();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2);
        assert!(Files::create(Path::new("/no/such/folder/r"))
            .is_err_and(|why| why.contains("--report")));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
