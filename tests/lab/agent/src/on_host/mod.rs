// SPDX-License-Identifier: MIT OR Apache-2.0
//! This program on somebody's machine: looks, asks, runs what applies, gives back what it had, writes a report.
//!
//! Nothing of the host is changed but devices that were given, and those only for a time. Scenarios run in processes of their
//! own (`worker`), so that an end of any kind finds this one able to clean up.

/// Prints, to a terminal that may be gone: what is to be given back is given back all the same.
macro_rules! say {
    ($($words:tt)*) => {{
        let _ = writeln!(std::io::stdout(), $($words)*);
    }};
}

/// Without an end of the line, at once.
macro_rules! mumble {
    ($($words:tt)*) => {{
        let mut out = std::io::stdout();
        let _ = write!(out, $($words)*);
        let _ = out.flush();
    }};
}

macro_rules! complain {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($words)*);
    }};
}

mod checks;
mod choice;
mod devices;
mod facts;
mod options;
mod signals;
mod worker;
mod written;

use crate::host::programs::build_id;
use crate::place::{self, Host};
use crate::scenarios;
use choice::{Choice, Given};
use devices::{Device, Taken};
use facts::Facts;
use options::Options;
use serde_json::{json, Map, Value};
use std::collections::VecDeque;
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use worker::Ended;
use written::{Contents, Files, Row, Verdict};

/// Nothing was run.
const COULD_NOT: u8 = 2;
const INTERRUPTED: u8 = 130;
/// A guest without any of our work that does not boot: then Linux guests say nothing about ours.
const BASELINE: &str = "stock-linux";
const OF_LINUX: &[&str] = &["ordinary-linux", "device-disk"];
/// How much of an NVMe disk is read.
pub const DISK_BYTES: usize = 16 << 20;

/// The program's whole life.
pub fn run() -> ExitCode {
    let words: Result<Vec<String>, _> = std::env::args_os()
        .skip(1)
        .map(|word| word.into_string())
        .collect();
    let words = match words {
        Ok(words) => words,
        Err(word) => return refuse(&format!("{} is no text", word.to_string_lossy())),
    };
    if let [word, name] = words.as_slice() {
        if word == worker::WORD {
            return match worker::work(name) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => refuse(&error),
            };
        }
    }
    let options = match options::read(words) {
        Ok(Some(options)) => options,
        Ok(None) => {
            mumble!("{}", options::USAGE);
            return ExitCode::SUCCESS;
        }
        Err(error) => return refuse(&error),
    };
    signals::catch();
    worker::adopt_orphans();
    match go(&options) {
        Ok(status) => ExitCode::from(status),
        Err(error) => refuse(&error),
    }
}

fn refuse(reason: &str) -> ExitCode {
    complain!("gmem-host: {reason}");
    ExitCode::from(if signals::caught() {
        INTERRUPTED
    } else {
        COULD_NOT
    })
}

fn go(options: &Options) -> Result<u8, String> {
    let program = std::env::current_exe().map_err(|error| format!("where am I? {error}"))?;
    checks::root()?;
    let facts = Facts::find()?;
    let devices: Vec<Device> = options
        .devices
        .iter()
        .map(|address| Device::find(address))
        .collect::<Result<_, _>>()?;
    let image = image(options, &facts)?;
    let given = Given {
        devices: devices.len(),
        engines: devices.iter().filter(|device| device.is_engine()).count(),
        disk: devices.iter().any(|device| disk_of(device).is_some()),
        firmware: image.is_some(),
    };
    let known = scenarios::names();
    let choices = choice::choose(&facts, given, options.only.as_deref(), &known)?;
    // The last, since it reads all of it.
    let folder = checks::folder(&program)?;
    for line in facts.lines() {
        say!("{line}");
    }
    say!();
    if options.list {
        for choice in &choices {
            say!(
                "{:<24} {}",
                choice.name,
                choice.reason.as_deref().unwrap_or("would run")
            );
        }
        return Ok(0);
    }
    if choices
        .iter()
        .all(|choice| choice.reason.is_some() && !choice.fault)
    {
        let first = choices
            .first()
            .and_then(|choice| choice.reason.clone())
            .unwrap_or_default();
        return Err(format!(
            "nothing of what was asked for can run here (--list says why): {first}"
        ));
    }
    let disk = image.as_ref().and_then(|image| image.disk.as_ref());
    checks::has_memory(if disk.is_some() { 3 << 30 } else { 1 << 30 })?;
    not_interrupted()?;
    let work = Work(checks::work(options.work.as_deref())?);
    let files = Files::create(&options.report)?;
    let session = Session {
        options,
        program: &program,
        folder,
        work: &work.0,
        facts: &facts,
        image,
    };
    let contents = match session.run(devices, choices) {
        Ok(contents) => contents,
        Err(error) => {
            files.discard();
            return Err(error);
        }
    };
    // The logs are what helps when something failed.
    let logs = if contents.failed() > 0 {
        logs(&work.0)
    } else {
        Vec::new()
    };
    say!(
        "\n{} passed, {} failed, {} skipped",
        contents.passed(),
        contents.failed(),
        contents.skipped()
    );
    for sentence in &contents.left {
        complain!("gmem-host: not as it was: {sentence}");
    }
    let paths = match files.write(&contents, &logs) {
        Ok(paths) => paths,
        Err(error) => {
            mumble!("{}", contents.to_text());
            return Err(format!(
                "the report, which is above, can't be written: {error}"
            ));
        }
    };
    let paths: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    say!("report: {}", paths.join(", "));
    Ok(contents.status())
}

/// Before anything is changed.
fn not_interrupted() -> Result<(), String> {
    match signals::caught() {
        true => Err("interrupted; nothing was changed".into()),
        false => Ok(()),
    }
}

/// The folder for the time of the run.
struct Work(PathBuf);

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The logs of scenarios, one after the other.
fn logs(work: &Path) -> Vec<u8> {
    let mut text = Vec::new();
    let entries = fs::read_dir(work).into_iter().flatten().flatten();
    let mut logs: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "log"))
        .collect();
    logs.sort();
    for log in logs {
        let name = log.file_name().unwrap_or_default().to_string_lossy();
        text.extend_from_slice(format!("==== {name}\n").as_bytes());
        text.extend(fs::read(&log).unwrap_or_default());
    }
    text
}

/// The guest of `--firmware`: of the kind that was asked for, or the one that the host has.
fn image(options: &Options, facts: &Facts) -> Result<Option<place::Image>, String> {
    if options.firmware.is_none() {
        return Ok(None);
    }
    let kind = match (options.kind.as_deref(), &facts.snp, &facts.tdx) {
        (Some("snp"), None, _) => return Err("--kind snp: this host's KVM offers no SNP VMs (kvm_amd.sev_snp, and SEV-SNP switched on in the firmware's setup)".into()),
        (Some("tdx"), _, None) => return Err("--kind tdx: this host's KVM offers no TDX VMs (kvm_intel.tdx=1, and TDX switched on in the firmware's setup)".into()),
        (Some(kind), ..) => kind,
        (None, Some(_), None) => "snp",
        (None, None, Some(_)) => "tdx",
        (None, Some(_), Some(_)) => return Err("this host offers SNP and TDX VMs: --kind says which the firmware is for".into()),
        (None, None, None) => return Err("--firmware: this host's KVM offers neither SNP nor TDX VMs".into()),
    };
    let snp = facts.snp.clone().unwrap_or_default();
    checks::image(options, kind, snp.c_bit, snp.reduced_bits)
}

/// The disk of an NVMe controller that has one.
fn disk_of(device: &Device) -> Option<&str> {
    device
        .is_nvme()
        .then(|| device.disks.first().map(String::as_str))
        .flatten()
}

struct Session<'a> {
    options: &'a Options,
    program: &'a Path,
    folder: PathBuf,
    work: &'a Path,
    facts: &'a Facts,
    image: Option<place::Image>,
}

impl Session<'_> {
    fn run(&self, devices: Vec<Device>, choices: Vec<Choice>) -> Result<Contents, String> {
        let before = checks::state();
        self.ask(&devices)?;
        let disk = devices
            .iter()
            .find_map(|device| Some((device.address.clone(), disk_of(device)?.to_string())));
        let disk = disk
            .map(|(address, disk)| {
                let digest = devices::digest(&disk, DISK_BYTES)
                    .map_err(|error| format!("reading the first 16 MiB of {disk}: {error}"))?;
                Ok::<_, String>((address, digest))
            })
            .transpose()?;
        let host = Host {
            folder: self.folder.clone(),
            work: self.work.to_path_buf(),
            cpu: self.options.cpu.clone(),
            devices: devices
                .iter()
                .map(|device| device.address.clone())
                .collect(),
            disk,
            image: self.image.clone(),
            patience: self.options.patience,
        };
        not_interrupted()?;
        let mut taken: Vec<Taken> = Vec::new();
        let mut untaken = None;
        for device in devices {
            if untaken.is_none() && !signals::caught() {
                match device.take() {
                    Ok(device) => taken.push(device),
                    Err(reason) => untaken = Some(reason),
                }
            }
        }
        let (rows, interrupted) = match untaken {
            None => self.scenarios(&host, choices),
            Some(_) => (Vec::new(), signals::caught()),
        };
        let mut left = Vec::new();
        let mut described = Vec::new();
        for mut device in taken {
            let back = device.give_back();
            described.push(device.device.to_json(back.is_ok()));
            left.extend(back.err());
        }
        if let Some(devices::Untaken {
            reason,
            left: untaken,
        }) = untaken
        {
            left.extend(untaken);
            if left.is_empty() {
                return Err(reason);
            }
            left.push(reason);
        }
        // A host has a life of its own: modules come, file systems are mounted.
        let differs = checks::differences(&before, &checks::state());
        Ok(Contents {
            versions: self.versions(),
            host: self.facts.to_json(),
            host_lines: self.facts.lines(),
            devices: described,
            rows,
            interrupted,
            left,
            differs,
        })
    }

    /// Nobody's device is taken unasked.
    fn ask(&self, devices: &[Device]) -> Result<(), String> {
        if devices.is_empty() || self.options.yes {
            return Ok(());
        }
        if !std::io::stdin().is_terminal() {
            return Err(
                "--device takes a device from this host, and there is nobody to ask: say --yes"
                    .into(),
            );
        }
        for device in devices {
            mumble!(
                "Take {} until the end of this run, reset it, and let guests drive it? [y/N] ",
                device.describe()
            );
            let answer = signals::line().unwrap_or_default();
            if !matches!(answer.trim(), "y" | "Y" | "yes") {
                return Err(format!(
                    "{} was not given; nothing was changed",
                    device.address
                ));
            }
        }
        Ok(())
    }

    fn scenarios(&self, host: &Host, choices: Vec<Choice>) -> (Vec<Row>, bool) {
        let mut rows: Vec<Row> = Vec::new();
        let mut waiting: VecDeque<Choice> = choices.into();
        while let Some(choice) = waiting.pop_front() {
            let name = choice.name;
            let fault = choice.fault;
            let (verdict, facts) = match choice.reason.or_else(|| without_baseline(&name, &rows)) {
                Some(reason) if fault => (Verdict::Failed(reason), Map::new()),
                Some(reason) => (Verdict::Skipped(reason), Map::new()),
                None if signals::caught() => (Verdict::Skipped("interrupted".into()), Map::new()),
                None => self.one(host, &name),
            };
            let (word, sentence) = verdict.words();
            say!("{name:<24} {word:<8} {}", sentence.unwrap_or_default());
            rows.push(Row {
                name,
                result: verdict,
                facts,
            });
        }
        (rows, signals::caught())
    }

    fn one(&self, host: &Host, name: &str) -> (Verdict, Map<String, Value>) {
        let is_terminal = std::io::stdout().is_terminal();
        let progress = |text: &str| {
            if is_terminal {
                let text: String = text.chars().take(100).collect();
                mumble!("\r\x1b[K{name:<24} …        {text}\r");
            }
        };
        progress("");
        let ended = worker::run(self.program, name, host, progress);
        if is_terminal {
            mumble!("\r\x1b[K");
        }
        match ended {
            Ended::Passed(facts) => (Verdict::Passed, facts),
            Ended::Failed(facts, sentence) => (Verdict::Failed(sentence), facts),
            Ended::Interrupted => (Verdict::Skipped("interrupted".into()), Map::new()),
        }
    }

    fn versions(&self) -> Value {
        json!({
            "gmem": env!("CARGO_PKG_VERSION"),
            "qemu_build_id": build_id(&self.folder.join("qemu-system-x86_64")).unwrap_or_else(|failure| failure.to_string()),
            "folder": checks::sha256(&self.folder.join("SHA256SUMS")).unwrap_or_default(),
        })
    }
}

/// A host that can't boot Linux on plain RAM says nothing about ours.
fn without_baseline(name: &str, rows: &[Row]) -> Option<String> {
    let failed = rows
        .iter()
        .any(|row| row.name == BASELINE && matches!(row.result, Verdict::Failed(_)));
    (failed && OF_LINUX.contains(&name))
        .then(|| format!("{BASELINE} fails on this host, which has nothing of gmem in it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_guests_are_skipped_where_a_stock_one_fails() {
        let row = |result| Row {
            name: BASELINE.into(),
            result,
            facts: Map::new(),
        };
        let failed = [row(Verdict::Failed("x".into()))];
        assert!(without_baseline("ordinary-linux", &failed)
            .is_some_and(|reason| reason.contains(BASELINE)));
        assert_eq!(without_baseline("dump", &failed), None);
        assert_eq!(
            without_baseline("ordinary-linux", &[row(Verdict::Passed)]),
            None
        );
        let known = scenarios::names();
        assert!(OF_LINUX
            .iter()
            .chain([&BASELINE])
            .all(|name| known.contains(name)));
    }
}
