// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo lab`: guests on memory-backend-gmem, for real, on a machine without the hardware.
//!
//! `prepare` fetches and builds what is missing, `machine` boots L1 on it, `session` runs scenarios there. README.md beside
//! this folder has the picture.

mod apt;
mod bench;
mod cache;
mod cargo_tests;
mod demo;
mod firmware;
mod full;
mod host;
mod host_folder;
mod images;
mod in_l1;
mod initramfs;
mod install;
mod interrupt;
mod kernel;
mod library;
mod life;
mod machine;
mod mode;
mod nvme;
mod one_binary;
mod patches;
mod prepare;
mod process;
mod qemu;
mod report;
mod scheduled;
mod session;
mod sources;
mod suite;
mod tally;
mod tee_firmware;
mod tree;
mod ui;
mod version;

use anyhow::Result;
use clap::{Parser, Subcommand};
use prepare::{Choices, Ground};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab", version)]
/// Guests on memory-backend-gmem under real KVM guest_memfd, in an emulated machine
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// QEMU 11.1.x sources (a folder or a tarball) instead of Debian's
    #[arg(long, global = true, value_name = "PATH")]
    qemu_src: Option<PathBuf>,
    /// Linux 7.3.x sources (a folder or a tarball) instead of Debian's
    #[arg(long, global = true, value_name = "PATH")]
    kernel_src: Option<PathBuf>,
    /// Leave the lab's kernel as it came: without in-place conversion
    #[arg(long, global = true)]
    unpatched_kernel: bool,
    /// More for the command line of L1's kernel, as maple_tree.lab_faults=2
    #[arg(
        long,
        global = true,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true
    )]
    kernel_option: String,
    /// Where to keep what was fetched and built [default: gmem-lab in the user's cache folder]
    #[arg(long, global = true, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Multiplies every time limit of a scenario; for a slow machine
    #[arg(long, global = true, value_name = "FACTOR", env = "GMEM_LAB_PATIENCE", default_value = "1", value_parser = factor)]
    patience: f64,
}

#[derive(Subcommand)]
enum Command {
    /// Run the scenarios: what the project can do, with the facts measured on the way
    Demo,
    /// Run all tests and the scenarios; ends with a line `N passed, N failed, N skipped`
    Test {
        /// Run only tests with this in their names, or one of these: a,b
        filter: Option<String>,
        /// Also the kernel's selftests and long tests in L1, QEMU's own tests with the series, and each patch built alone
        #[arg(long)]
        full: bool,
    },
    /// Measure conversions against stock QEMU in one L1 of 12 GiB, and the library by itself
    Bench(bench::Options),
    /// A guest lives a random life, for as long and as often as one likes
    Life(life::Options),
    /// An interactive L1: a Linux host with KVM, the patched QEMU and devices to pass through
    Shell {
        /// With conversion in place, where private and shared bytes are in one file
        #[arg(long)]
        in_place: bool,
    },
    /// Install the patched QEMU with its firmware for one's own use
    Qemu {
        /// Where to: gets bin/ and share/
        #[arg(long, value_name = "DIR")]
        prefix: PathBuf,
    },
    /// Make a folder to copy to a real host, where its program runs the scenarios that fit it
    Host {
        /// Where to: an empty folder, or one that this made before
        #[arg(long, value_name = "DIR")]
        prefix: PathBuf,
    },
    /// Fetch and build everything, run nothing
    Prepare,
}

fn factor(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && (0.01..=1000.0).contains(&value) => Ok(value),
        _ => Err("a number from 0.01 to 1000 is needed".into()),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    interrupt::install();
    match run(arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            ui::note(&format!("lab: {error:#}"));
            ExitCode::from(if interrupt::signalled() { 130 } else { 2 })
        }
    }
}

/// Whether everything that was asked for went well.
fn run(arguments: Arguments) -> Result<bool> {
    let ground = Ground::open(Choices {
        qemu_src: arguments.qemu_src,
        kernel_src: arguments.kernel_src,
        unpatched_kernel: arguments.unpatched_kernel,
        kernel_option: arguments.kernel_option,
        cache: arguments.cache,
    })?;
    match arguments.command {
        Command::Demo => demo::run(&ground, arguments.patience),
        Command::Test { filter, full } => {
            suite::run(&ground, filter.as_deref(), full, arguments.patience)
        }
        Command::Bench(options) => bench::run(&ground, &options, arguments.patience),
        Command::Life(options) => life::run(&ground, &options, arguments.patience),
        Command::Shell { in_place } => demo::shell(&ground, in_place).map(|()| true),
        Command::Qemu { prefix } => install::run(&ground, &prefix).map(|()| true),
        Command::Host { prefix } => host_folder::run(&ground, &prefix).map(|()| true),
        Command::Prepare => {
            let _cache = ground.cache.lock()?;
            let prepared = prepare::prepare(&ground)?;
            ui::line(&format!(
                "ready: Linux {}, QEMU {}{}",
                prepared.kernel_source.version,
                prepared.qemu_source.version,
                if prepared.qemu.patched {
                    " with the series"
                } else {
                    " as it came"
                },
            ));
            Ok(true)
        }
    }
}
