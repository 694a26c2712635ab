// SPDX-License-Identifier: MIT OR Apache-2.0
//! L0: an emulated machine with SVM, a VT-d IOMMU and devices to hand on, which boots L1.

use crate::images::Images;
use crate::mode::Mode;
use crate::process;
use crate::scheduled::Scheduled;
use anyhow::{bail, Context, Result};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

/// What of L1 differs between the scenarios and the benchmark.
#[derive(Clone, Copy)]
pub struct Shape {
    pub memory_mib: u64,
    /// All memory is this machine's before L1 starts. The first touch of a page takes longer than what the benchmark
    /// does with it (8 ms instead of half a millisecond for 2 MiB), and would hit one side or the other by chance.
    pub touched: bool,
    /// NUMA nodes, each with its part of the memory and of the two processors.
    pub nodes: u64,
    /// For the kernel's command line.
    pub kernel_options: &'static str,
    /// `edu` devices, from slot 0x11 on.
    pub edus: usize,
    /// More of their properties, for a QEMU that has them.
    pub edu_properties: &'static str,
}

/// For the scenarios. One page of 1 GiB is set aside while there surely is one, on the second node, which the kernel
/// itself hardly uses. What is wrong with maple nodes, in which guest_memfds keep their attributes, is said.
pub const SMALL: Shape = Shape {
    memory_mib: 4096,
    touched: false,
    nodes: 2,
    kernel_options: "hugepagesz=1G hugepages=1:1 slab_debug=FZPU,maple_node",
    edus: 2,
    edu_properties: "",
};

/// The same with processors that poll when they are idle, to find out what of L1's freezes that takes away.
pub const POLLING: Shape = Shape {
    kernel_options: "hugepagesz=1G hugepages=1:1 slab_debug=FZPU,maple_node idle=poll",
    ..SMALL
};

/// What L0 itself takes, and some air.
const OVERHEAD_MIB: u64 = 512;
const FIRST_EDU: usize = 0x11;
/// Interrupt remapping stalls timers under TCG and is off; vfio and iommufd then want to be told that this is fine.
const COMMAND_LINE: &str = "console=ttyS0 intel_iommu=on iommufd.allow_unsafe_interrupts=1 \
                            vfio_iommu_type1.allow_unsafe_interrupts=1 panic=-1 lab.role=l1";
/// Without fast string instructions: the emulator carries them out byte by byte, and a kernel that
/// relies on them clears a page eight times slower than by words. On hardware clearing costs little.
const PROCESSOR: &str = "max,erms=off,fsrm=off";
const PROCESSORS: u64 = 2;

pub struct Machine<'a> {
    pub qemu: &'a Path,
    pub firmware: &'a Path,
    pub images: &'a Images,
    pub nvme: &'a Path,
    pub shape: Shape,
    pub mode: Mode,
    /// More words for the kernel's command line.
    pub words: &'a str,
    /// Where L0's own monitor is to listen.
    pub monitor: Option<&'a Path>,
}

/// A running L1. Dropping it ends it.
pub struct Running {
    child: Child,
    report: ChildStdout,
    pending: Vec<u8>,
}

/// What came from the report port.
pub enum Heard {
    Line(String),
    Nothing,
    /// The machine is off, or L0 died.
    End,
}

impl Machine<'_> {
    /// Boots L1 to run `scenarios`. Its console goes to a file, its reports to us.
    pub fn start(&self, scenarios: &[&str], console: &Path, errors: &Path) -> Result<Running> {
        let mut command = self.command(&format!("lab.run={}", scenarios.join(",")))?;
        command
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", escaped(console)?))
            .args(["-serial", "chardev:console"])
            .args(["-chardev", "stdio,id=report,signal=off"])
            .args(["-serial", "chardev:report"])
            .arg("-monitor")
            .arg(match self.monitor {
                Some(path) => format!("unix:{},server=on,wait=off", escaped(path)?),
                None => "none".into(),
            })
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(
                File::create(errors)
                    .with_context(|| format!("can't write {}", errors.display()))?,
            );
        let mut child = process::spawn(&mut command)?;
        let report = child.stdout.take().context("L0 has no output")?;
        Ok(Running {
            child,
            report,
            pending: Vec::new(),
        })
    }

    /// An L1 with a shell on this terminal; returns when it is left.
    pub fn shell(&self) -> Result<()> {
        let mut command = self.command("lab.run=shell")?;
        command
            .args(["-chardev", "stdio,id=console,mux=on,signal=off"])
            .args(["-serial", "chardev:console", "-mon", "chardev=console"])
            .args(["-chardev", "null,id=report", "-serial", "chardev:report"]);
        // In our own process group: it reads the terminal.
        process::die_with_parent(&mut command);
        let status = command.status().context("can't run L0's QEMU")?;
        if !status.success() {
            bail!("L0's QEMU ended with {status}");
        }
        Ok(())
    }

    fn command(&self, run: &str) -> Result<Command> {
        let mut command = Command::new(self.qemu);
        command
            .arg("-L")
            .arg(self.firmware)
            .args(["-name", "gmem-lab", "-nodefaults", "-no-user-config"])
            .args([
                "-machine",
                "q35",
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                PROCESSOR,
            ])
            .args([
                "-smp",
                &PROCESSORS.to_string(),
                "-m",
                &format!("{}M", self.shape.memory_mib),
            ])
            .args(["-display", "none", "-no-reboot"])
            .args(self.shape.touched.then_some("-mem-prealloc"));
        let nodes = self.shape.nodes;
        for node in 0..nodes {
            let size = self.shape.memory_mib / nodes;
            let first = PROCESSORS / nodes * node;
            let last = first + PROCESSORS / nodes - 1;
            command
                .args([
                    "-object",
                    &format!("memory-backend-ram,id=ram{node},size={size}M"),
                ])
                .args([
                    "-numa",
                    &format!("node,nodeid={node},cpus={first}-{last},memdev=ram{node}"),
                ]);
        }
        command
            .args(["-device", "intel-iommu,aw-bits=48,intremap=off"])
            .arg("-blockdev")
            .arg(format!(
                "driver=raw,node-name=nvme,file.driver=file,file.filename={}",
                escaped(self.nvme)?
            ))
            .args([
                "-device",
                "nvme,bus=pcie.0,addr=0x10,drive=nvme,serial=lab-nvme",
            ])
            .args((0..self.shape.edus).flat_map(|index| {
                let (slot, more) = (FIRST_EDU + index, self.shape.edu_properties);
                let device = format!("edu,bus=pcie.0,addr={slot:#x},dma_mask=0xffffffffff{more}");
                ["-device".to_string(), device]
            }))
            .arg("-kernel")
            .arg(&self.images.kernel)
            .arg("-initrd")
            .arg(&self.images.initramfs)
            .args([
                "-append",
                &format!(
                    "{COMMAND_LINE} {} {} {} {run}",
                    self.mode.option(),
                    self.shape.kernel_options,
                    self.words
                ),
            ]);
        Ok(command)
    }
}

impl Running {
    /// What this machine gave to the emulator so far.
    pub fn scheduled(&self) -> Scheduled {
        Scheduled::of(self.child.id())
    }

    /// Waits for a line for at most `patience`.
    pub fn listen(&mut self, patience: Duration) -> Result<Heard> {
        if let Some(line) = self.take_line() {
            return Ok(Heard::Line(line));
        }
        if !process::readable(self.report.as_raw_fd(), patience) {
            return Ok(Heard::Nothing);
        }
        let mut buffer = [0u8; 4096];
        match self.report.read(&mut buffer) {
            Ok(0) => Ok(Heard::End),
            Ok(count) => {
                self.pending.extend_from_slice(&buffer[..count]);
                Ok(self.take_line().map_or(Heard::Nothing, Heard::Line))
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(Heard::Nothing),
            // QEMU sets its ends of the pipe non-blocking, which may reach ours.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(Heard::Nothing),
            Err(error) => Err(error).context("reading L1's reports"),
        }
    }

    fn take_line(&mut self) -> Option<String> {
        let end = self.pending.iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = self.pending.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim().to_string())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        process::end(&mut self.child);
    }
}

/// QEMU's option parser ends a value at a comma unless it is doubled.
fn escaped(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.replace(',', ",,"))
}

/// L1's memory is ordinary memory of this machine.
pub fn require_memory(shape: &Shape) -> Result<()> {
    let memory_mib = shape.memory_mib;
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match available_mib(&text) {
        Some(available) if available < memory_mib + OVERHEAD_MIB => bail!(
            "L1 takes {memory_mib} MiB of memory, the emulator {OVERHEAD_MIB} MiB more, and only {available} MiB are \
             available on this machine"
        ),
        _ => Ok(()),
    }
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

/// Where L0 puts what of one boot.
pub fn console_path(results: &Path, boot: usize) -> PathBuf {
    match boot {
        1 => results.join("console.log"),
        _ => results.join(format!("console-{boot}.log")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_are_doubled_for_qemu() {
        assert_eq!(escaped(Path::new("/a,b/c")).unwrap(), "/a,,b/c");
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal: 100 kB\nMemAvailable:    2048000 kB\n";
        assert_eq!(available_mib(text), Some(2000));
        assert_eq!(available_mib(""), None);
    }
}
