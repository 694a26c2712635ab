// SPDX-License-Identifier: MIT OR Apache-2.0
//! What L1 says, line by line, and what becomes of it: report.json and the closing table.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

/// One line on L1's report port.
#[derive(Debug, Deserialize, PartialEq)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Line {
    Start {
        scenario: String,
    },
    Progress {
        scenario: String,
        text: String,
    },
    Result {
        scenario: String,
        ok: bool,
        seconds: f64,
        #[serde(default)]
        facts: Map<String, Value>,
        #[serde(default)]
        error: Option<String>,
    },
    Done,
}

impl Line {
    /// A line that is not ours (a kernel message that strayed) is `None`.
    pub fn parse(text: &str) -> Option<Line> {
        serde_json::from_str(text.trim()).ok()
    }
}

/// How a scenario ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    pub name: String,
    pub ok: bool,
    pub seconds: f64,
    pub facts: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The end of L1's console, when L1 died or hung.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<String>,
}

impl Outcome {
    /// Turns a success into a failure; a failure keeps its first reason.
    pub fn fail(&mut self, error: String) {
        self.ok = false;
        self.error.get_or_insert(error);
    }

    /// `ordinary-linux  ok  12.3 s  ram=512 MiB …`
    pub fn line(&self) -> String {
        let mark = if self.ok { "ok" } else { "FAILED" };
        let mut text = format!("{:<22} {mark:<7} {:>6.1} s", self.name, self.seconds);
        for (name, value) in &self.facts {
            text.push_str(&format!("  {name}={}", brief(value)));
        }
        if let Some(error) = &self.error {
            text.push_str(&format!("\n    {error}"));
        }
        if let Some(console) = &self.console {
            text.push_str("\n    the end of L1's console:");
            for line in console.lines() {
                text.push_str(&format!("\n      {line}"));
            }
        }
        text
    }
}

/// A fact in a line: strings bare, long hex (digests) cut, lists and objects by their size.
fn brief(value: &Value) -> String {
    match value {
        Value::String(text) if text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) => {
            format!("{}…", &text[..12])
        }
        Value::String(text) => text.clone(),
        Value::Array(items) => format!("[{} items]", items.len()),
        Value::Object(items) => format!("{{{} entries}}", items.len()),
        other => other.to_string(),
    }
}

/// The table at the end.
pub fn table(outcomes: &[Outcome]) -> String {
    let width = (outcomes.iter().map(|outcome| outcome.name.len()).max())
        .unwrap_or(0)
        .max("scenario".len());
    let rule = format!("+-{}-+--------+-----------+", "-".repeat(width));
    let mut text = format!(
        "{rule}\n| {:<width$} | result |      time |\n{rule}\n",
        "scenario"
    );
    for outcome in outcomes {
        let mark = if outcome.ok { "ok" } else { "FAILED" };
        text.push_str(&format!(
            "| {:<width$} | {mark:<6} | {:>7.1} s |\n",
            outcome.name, outcome.seconds
        ));
    }
    text.push_str(&rule);
    text
}

/// Writes report.json: whole or not at all.
pub fn write(outcomes: &[Outcome], path: &Path) -> Result<()> {
    #[derive(Serialize)]
    struct Report<'a> {
        scenarios: &'a [Outcome],
    }
    let text = serde_json::to_string_pretty(&Report {
        scenarios: outcomes,
    })?;
    let part = path.with_extension("json.part");
    std::fs::write(&part, text + "\n")
        .and_then(|()| std::fs::rename(&part, path))
        .with_context(|| format!("can't write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lines_of_the_contract_are_understood() {
        assert_eq!(
            Line::parse(r#"{"type":"start","scenario":"a"}"#),
            Some(Line::Start {
                scenario: "a".into()
            })
        );
        assert_eq!(
            Line::parse("{\"type\":\"progress\",\"scenario\":\"a\",\"text\":\"up\"}\r\n"),
            Some(Line::Progress {
                scenario: "a".into(),
                text: "up".into()
            })
        );
        let line = Line::parse(
            r#"{"type":"result","scenario":"a","ok":false,"seconds":1.5,"facts":{"x":1},"error":"why"}"#,
        );
        let Some(Line::Result { facts, error, .. }) = line else {
            panic!("{line:?}");
        };
        assert_eq!(facts["x"], 1);
        assert_eq!(error.as_deref(), Some("why"));
        assert_eq!(Line::parse(r#"{"type":"done"}"#), Some(Line::Done));
    }

    #[test]
    fn strays_are_not_lines() {
        for text in [
            "",
            "[    1.0] pci",
            "{\"type\":\"start\"",
            r#"{"type":"else"}"#,
        ] {
            assert_eq!(Line::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_report_has_the_promised_shape() {
        let mut outcome = Outcome {
            name: "a".into(),
            ok: true,
            seconds: 1.25,
            facts: Map::from_iter([("x".to_string(), json!(1))]),
            error: None,
            console: None,
        };
        let path = std::env::temp_dir().join(format!("gmem-lab-report-{}", std::process::id()));
        write(std::slice::from_ref(&outcome), &path).unwrap();
        let read: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(
            read,
            json!({"scenarios": [{"name": "a", "ok": true, "seconds": 1.25, "facts": {"x": 1}}]})
        );
        outcome.fail("first".into());
        outcome.fail("second".into());
        assert!(!outcome.ok);
        assert_eq!(outcome.error.as_deref(), Some("first"));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn the_table_has_a_row_each() {
        let outcome = |name: &str, ok| Outcome {
            name: name.into(),
            ok,
            seconds: 3.0,
            facts: Map::new(),
            error: None,
            console: None,
        };
        let text = table(&[outcome("short", true), outcome("a-longer-name", false)]);
        assert!(
            text.contains("| short         | ok     |     3.0 s |"),
            "{text}"
        );
        assert!(text.contains("| a-longer-name | FAILED |"));
    }
}
