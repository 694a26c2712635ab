// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the builds need from the machine: looked for first, installed only where missing.

use crate::process::{self, Logs};
use crate::{apt, ui};
use anyhow::{bail, Result};
use std::process::Command;

/// How to see whether something is there.
pub enum Probe {
    /// Programs that must all be on the path.
    Tools(&'static [&'static str]),
    /// A header that the compiler must find.
    Header(&'static str),
    /// A library that pkg-config must know.
    Library(&'static str),
    /// A Python module.
    Python(&'static str),
}

/// What must be there, and the package that brings it.
pub type Need = (Probe, &'static str);

const NEEDS: &[Need] = &[
    (Probe::Tools(&["gcc", "cc", "ld", "objcopy"]), "gcc"),
    (Probe::Tools(&["g++"]), "g++"),
    (Probe::Header("stdio.h"), "libc6-dev"),
    (Probe::Tools(&["make"]), "make"),
    (Probe::Tools(&["patch"]), "patch"),
    (Probe::Tools(&["flex"]), "flex"),
    (Probe::Tools(&["bison"]), "bison"),
    (Probe::Tools(&["bc"]), "bc"),
    (Probe::Tools(&["xz"]), "xz-utils"),
    (Probe::Tools(&["perl"]), "perl"),
    (Probe::Tools(&["ninja"]), "ninja-build"),
    (Probe::Tools(&["pkg-config"]), "pkg-config"),
    (Probe::Tools(&["python3"]), "python3"),
    (Probe::Python("ensurepip, venv"), "python3-venv"),
    (Probe::Header("libelf.h"), "libelf-dev"),
    (Probe::Header("openssl/ssl.h"), "libssl-dev"),
    (Probe::Header("zlib.h"), "zlib1g-dev"),
    (Probe::Header("libfdt.h"), "libfdt-dev"),
    (Probe::Library("glib-2.0"), "libglib2.0-dev"),
];

pub fn is_root() -> bool {
    // SAFETY: geteuid can't fail and touches nothing.
    unsafe { libc::geteuid() == 0 }
}

/// Sees to what every command needs.
pub fn prepare(logs: &Logs) -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!(
            "the lab builds and boots x86-64 kernels and guests and has no cross compiler; this machine is {}",
            std::env::consts::ARCH
        );
    }
    install(logs, NEEDS)
}

/// Installs what of `needs` is missing, or says what to install.
pub fn install(logs: &Logs, needs: &[Need]) -> Result<()> {
    let missing = missing(needs);
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !process::on_path("apt-get") {
        bail!("these are missing and there is no apt-get to install them: {names}");
    }
    if !is_root() {
        bail!(
            "these packages are missing: {names}\nrun `apt-get install --no-install-recommends {names}` as root, or run \
             the lab as root once"
        );
    }
    let step = ui::step("host packages", &format!("installing {names}"));
    let apt_get = || {
        let mut command = Command::new("apt-get");
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C.UTF-8");
        command
    };
    // Third-party sources may fail here without harm: what counts is whether the packages can be had.
    let (_, update_log) = logs.run_uninterrupted("host-update", apt_get().arg("update"), |_| ())?;
    let mut install = apt_get();
    install
        .args([
            "-o",
            "Acquire::Retries=3",
            "-o",
            "DPkg::Lock::Timeout=300",
            "install",
            "-y",
            "--no-install-recommends",
        ])
        .args(&missing);
    let (status, log) = logs.run_uninterrupted("host-packages", &mut install, |_| ())?;
    if !status.success() {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let log = if text.contains("Unable to locate package") {
            update_log
        } else {
            log
        };
        bail!(
            "{}\nneeded: {names}",
            apt::explain("installing packages for the builds", &log)
        );
    }
    let still = self::missing(needs);
    if !still.is_empty() {
        bail!(
            "apt installed the packages, yet this is still not found: {}",
            still.join(" ")
        );
    }
    step.done(&format!("installed {names}"));
    Ok(())
}

fn missing(needs: &[Need]) -> Vec<&'static str> {
    needs
        .iter()
        .filter(|(probe, _)| !present(probe))
        .map(|(_, package)| *package)
        .collect()
}

fn present(probe: &Probe) -> bool {
    let succeeds = |command: &mut Command| process::output(command).is_ok();
    match probe {
        Probe::Tools(names) => names.iter().all(|name| process::on_path(name)),
        Probe::Header(name) => {
            // Preprocessing nothing with the header forced in finds it wherever the compiler would.
            succeeds(Command::new("cc").args(["-E", "-x", "c", "-include", name, "/dev/null"]))
        }
        Probe::Library(name) => succeeds(Command::new("pkg-config").args(["--exists", name])),
        Probe::Python(modules) => {
            succeeds(Command::new("python3").args(["-c", &format!("import {modules}")]))
        }
    }
}

/// Processors to build with.
pub fn jobs() -> usize {
    std::thread::available_parallelism().map_or(2, |count| count.get())
}
