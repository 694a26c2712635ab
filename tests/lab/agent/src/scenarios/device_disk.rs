// SPDX-License-Identifier: MIT OR Apache-2.0
//! An NVMe controller that was given, driven by a Linux guest on a guest_memfd: what its disk holds arrives by DMA as the host
//! read it before. Nothing is written to the disk.

use crate::boot::CommandLine;
use crate::failure::Attempt;
use crate::host::memory::backing;
use crate::linux_guest::LinuxGuest;
use crate::place;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};

const RAM_BYTES: u64 = 512 << 20;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let host = place::host().attempt(|| "devices are given on hosts only".into())?;
    let (address, digest) = host.disk.as_ref().attempt(|| "no disk was given".into())?;
    let mut guest = LinuxGuest::start(
        scenario.directory(),
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}"),
            "-machine",
            "q35,accel=kvm,memory-backend=ram0",
            "-m",
            "512M",
            "-smp",
            "2",
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            &format!("vfio-pci,host={address},iommufd=iommufd0"),
        ],
        "lab.job=nvme-read",
    )?;
    let result = guest.result()?;
    scenario.fact("read_bytes", result["read_bytes"].clone());
    scenario.check(
        backing(guest.machine.pid(), RAM_BYTES)?.is_guest_memfd(),
        "the mapping behind RAM is of a guest_memfd",
    )?;
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    let block = gmem.block("ram0")?;
    scenario.fact("dma_mapped_bytes", block.number("dma-mapped")?);
    // The digest says what somebody's disk holds, so it is compared and not told.
    scenario.check(
        result["read_sha256"].as_str() == Some(digest),
        "what the guest read from the disk by DMA is what the host had read",
    )?;
    guest.finish()
}
