// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo lab`: guests on memory-backend-gmem, for real, on a machine without the hardware.

use clap::{Parser, Subcommand};
use std::path::PathBuf;

#[derive(Parser)]
#[command(name = "cargo lab", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// QEMU 11.1.x sources (a directory or a tarball) instead of Debian's
    #[arg(long, global = true, value_name = "PATH")]
    qemu_src: Option<PathBuf>,
    /// Linux 7.3.x sources (a directory or a tarball) instead of Debian's
    #[arg(long, global = true, value_name = "PATH")]
    kernel_src: Option<PathBuf>,
    /// Where to keep what was fetched and built [default: gmem-lab in the user's cache folder]
    #[arg(long, global = true, value_name = "DIR")]
    cache: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch and build everything, run nothing
    Prepare,
}

fn main() {
    let _arguments = Arguments::parse();
}
