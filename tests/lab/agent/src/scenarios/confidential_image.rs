// SPDX-License-Identifier: MIT OR Apache-2.0
//! An SNP or TDX guest with the firmware and the disk that somebody gave: it boots on memory-backend-gmem, converts, and is up
//! as it is on memory-backend-memfd, which is tried first: what fails there as well is none of ours.

use super::timings::ratio;
use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::files;
use crate::lines::Lines;
use crate::machine::Machine;
use crate::place::{self, Image};
use crate::qmp::Gmem;
use crate::rebuilt::status;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 2048 * MIB;
/// The lab's firmware needs no more, and its host has no more.
const SMALL_RAM_BYTES: u64 = 256 * MIB;
const BOOT_PATIENCE: Duration = Duration::from_secs(600);
const ID: &str = "ram0";

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let host = place::host().attempt(|| "images are given on hosts only".into())?;
    let image = host
        .image
        .as_ref()
        .attempt(|| "no firmware was given".into())?;
    scenario.fact("kind", image.kind.as_str());
    scenario.fact("has_disk", image.disk.is_some());
    // Not everywhere: where kernels convert in place, QEMU's own memory has no private half.
    let baseline = boot(scenario, image, "memory-backend-memfd,share=on");
    let memfd = match baseline {
        Ok((seconds, mut machine)) => {
            quit(&mut machine)?;
            scenario.progress("up on memory-backend-memfd");
            Ok(seconds)
        }
        Err(failure) => {
            scenario.fact("memory-backend-memfd", failure.to_string());
            Err(failure)
        }
    };
    let booted = boot(scenario, image, "memory-backend-gmem");
    let (gmem, mut machine) = match (booted, &memfd) {
        (Ok(guest), _) => guest,
        (Err(failure), Ok(_)) => return Err(failure),
        (Err(failure), Err(stock)) => {
            return Err(Failure::new(format!(
                "{failure}; on memory-backend-memfd, which has nothing of gmem, neither: {stock}"
            )))
        }
    };
    scenario.progress("up on memory-backend-gmem");
    scenario.check_equal(status(&mut machine)?, "running".into(), "query-status")?;
    files::are_kept(scenario, machine.pid(), &[], "the guest at work")?;
    let books = Gmem::query(&mut machine.qmp)?;
    let block = books.block(ID)?;
    for name in ["backing", "dma-strategy"] {
        if let Ok(text) = block.text(name) {
            scenario.fact(name, text);
        }
    }
    for name in [
        "private",
        "shared",
        "private-runs",
        "to-private",
        "to-shared",
        "quarantined",
    ] {
        scenario.fact(name, block.number(name)?);
    }
    scenario.fact("failures", books.total("failures")?);
    scenario.check(
        block.number("private")? > 0,
        "a guest that is up has private memory, by query-gmem",
    )?;
    scenario.check_equal(books.total("failures")?, 0, "conversions that failed")?;
    scenario.check_equal(block.number("quarantined")?, 0, "quarantined bytes")?;
    quit(&mut machine)?;
    drop(machine);
    if let Ok(memfd) = memfd {
        let ratio = ratio(&[memfd], &[gmem]);
        scenario.fact(
            "ratios",
            json!({"start of QEMU until the guest is up": ratio}),
        );
    }
    Ok(())
}

fn quit(machine: &mut Machine) -> Outcome {
    machine.qmp.execute("quit", json!({}))?;
    machine.wait_for_exit(place::patience(Duration::from_secs(120)))
}

/// Seconds until it is up, and the guest.
fn boot(scenario: &Scenario, image: &Image, backend: &str) -> Result<(f64, Machine), Failure> {
    let bytes = if image.disk.is_some() {
        RAM_BYTES
    } else {
        SMALL_RAM_BYTES
    };
    let (object, machine) = guest(image);
    let memory = format!("{backend},id={ID},size={bytes}");
    let megabytes = format!("{}M", bytes / MIB);
    let machine = format!("{machine},memory-backend={ID}");
    let firmware = text(&image.firmware)?;
    let mut arguments = vec![
        "-object", &object, "-object", &memory, "-m", &megabytes, "-machine", &machine, "-bios",
        firmware, "-smp", "2",
    ];
    let drive;
    if let Some(disk) = &image.disk {
        drive = self::drive(disk)?;
        arguments.extend(["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"]);
    }
    let begin = Instant::now();
    let name = backend.split(',').next().unwrap_or(backend);
    let directory = scenario.directory().join(name);
    let (machine, serial) = Machine::start(&directory, &arguments).map_err(|failure| {
        let said = fs::read_to_string(directory.join("qemu.stderr")).unwrap_or_default();
        Failure::new(format!("{failure} (QEMU said: {})", said.trim()))
    })?;
    is_up(&serial, &image.until).map_err(|failure| {
        Failure::new(format!(
            "{failure} (QEMU said: {})",
            machine.complaints().trim()
        ))
    })?;
    Ok((begin.elapsed().as_secs_f64(), machine))
}

fn is_up(serial: &Lines, until: &str) -> Result<(), Failure> {
    serial.find_part(
        place::patience(BOOT_PATIENCE),
        &format!("{until:?}, which --until says"),
        until,
    )
}

/// The guest's object and the machine, without its memory.
fn guest(image: &Image) -> (String, String) {
    let machine = "q35,accel=kvm,smm=off,confidential-guest-support=cgs0";
    match image.kind.as_str() {
        "tdx" => (
            "tdx-guest,id=cgs0".into(),
            format!("{machine},kernel-irqchip=split"),
        ),
        _ => (
            format!(
                "sev-snp-guest,id=cgs0,cbitpos={},reduced-phys-bits={}",
                image.c_bit, image.reduced_bits
            ),
            machine.into(),
        ),
    }
}

fn text(path: &Path) -> Result<&str, Failure> {
    path.to_str()
        .attempt(|| format!("{} is no text", path.display()))
}

/// What the guest writes goes to a file without a name.
fn drive(disk: &Path) -> Result<String, Failure> {
    let mut start = [0; 4];
    File::open(disk)
        .and_then(|mut file| file.read_exact(&mut start))
        .attempt(|| format!("reading {}", disk.display()))?;
    let format = if &start == b"QFI\xfb" { "qcow2" } else { "raw" };
    let path = text(disk)?.replace(',', ",,");
    Ok(format!(
        "if=none,id=disk,snapshot=on,format={format},file={path}"
    ))
}

#[cfg(test)]
mod tests {
    use super::{drive, guest};
    use crate::place::Image;

    #[test]
    fn the_guest_is_of_the_kind_that_was_asked_for() {
        let mut image = Image {
            kind: "snp".into(),
            firmware: "/f".into(),
            disk: None,
            until: "x".into(),
            c_bit: 51,
            reduced_bits: 5,
        };
        assert_eq!(
            guest(&image).0,
            "sev-snp-guest,id=cgs0,cbitpos=51,reduced-phys-bits=5"
        );
        image.kind = "tdx".into();
        assert!(
            guest(&image).0.starts_with("tdx-guest,")
                && guest(&image).1.ends_with("kernel-irqchip=split")
        );
    }

    #[test]
    fn a_disks_format_is_found_and_not_guessed_by_the_guest() {
        let path = std::env::temp_dir().join(format!("gmem,disk-{}", std::process::id()));
        std::fs::write(&path, b"QFI\xfb....").unwrap();
        let found = drive(&path).unwrap();
        assert!(
            found.contains("format=qcow2") && found.contains("gmem,,disk"),
            "{found}"
        );
        std::fs::write(&path, b"MBR.....").unwrap();
        assert!(drive(&path).unwrap().contains("format=raw"));
        std::fs::remove_file(&path).unwrap();
    }
}
