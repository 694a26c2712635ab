// SPDX-License-Identifier: MIT OR Apache-2.0
//! A Linux guest with this same program as its init.

use crate::failure::{Attempt, Failure};
use crate::job::{AGAIN, MARK};
use crate::lines::Lines;
use crate::machine::Machine;
use crate::place;
use serde_json::{json, Value};
use std::path::Path;
use std::time::Duration;

/// Boot and job together, under nested emulation on a loaded machine.
const JOB_PATIENCE: Duration = Duration::from_secs(300);
const EXIT_PATIENCE: Duration = Duration::from_secs(120);

/// A Linux guest under way.
pub struct LinuxGuest {
    pub machine: Machine,
    serial: Lines,
}

impl LinuxGuest {
    /// Boots Linux with these QEMU arguments and this job (words for the guest's kernel command line).
    pub fn start(directory: &Path, arguments: &[&str], job: &str) -> Result<Self, Failure> {
        // quiet: every character of the boot messages is an exit through two levels of emulation.
        // i8042.*: probing for a PS/2 mouse takes over a minute here, and powering off waits for it.
        let command_line =
            format!("console=ttyS0 quiet i8042.noaux i8042.nokbd panic=-1 lab.role=l2 {job}");
        let mut all = vec![
            "-no-reboot",
            "-kernel",
            place::linux(),
            "-initrd",
            place::initramfs(),
        ];
        all.extend(["-append", &command_line]);
        all.extend(arguments);
        let (machine, serial) = Machine::start(directory, &all)?;
        Ok(Self { machine, serial })
    }

    /// The facts that the job found. The guest then waits until `finish`.
    pub fn result(&mut self) -> Result<Value, Failure> {
        let found = self.serial.find(
            place::patience(JOB_PATIENCE),
            "the guest's result",
            |line| line.split_once(MARK).map(|(_, result)| result.to_string()),
        );
        if found.is_err() {
            self.show_processors();
        }
        let text = found?;
        let result: Value = serde_json::from_str(&text)
            .attempt(|| format!("the guest's result is no JSON: {text}"))?;
        match result["error"].as_str() {
            Some(error) => Err(Failure::new(format!("in the guest: {error}"))),
            None => Ok(result["facts"].clone()),
        }
    }

    /// Has the guest do its job once more, after a result.
    pub fn again(&mut self) -> Result<Value, Failure> {
        self.serial.send(AGAIN)?;
        self.result()
    }

    /// Where a guest that does not answer is: twice, so that one that runs can be told from one that waits.
    fn show_processors(&mut self) {
        for _ in 0..2 {
            let command = json!({"command-line": "info registers -a"});
            match self.machine.qmp.execute("human-monitor-command", command) {
                Ok(text) => println!("{}", text.as_str().unwrap_or_default()),
                Err(failure) => println!("no registers: {failure}"),
            }
        }
    }

    /// Lets the guest power off and waits until QEMU has ended with success.
    pub fn finish(&mut self) -> Result<(), Failure> {
        self.serial.send("continue")?;
        self.machine.wait_for_exit(place::patience(EXIT_PATIENCE))
    }
}
