// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ordinary guest with an NVMe controller passed through: its disk's bytes travel by DMA into a guest_memfd.
//!
//! The guest reads 16 MiB and writes them back changed; whoever owns the disk's image compares afterwards.

use crate::boot::CommandLine;
use crate::host::memory::{backing, threads};
use crate::host::passthrough::{to_vfio, NVME};
use crate::host::tracing::{Ioctls, IOMMU_IOAS_MAP, IOMMU_IOAS_MAP_FILE, IOMMU_IOAS_UNMAP};
use crate::linux_guest::LinuxGuest;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};

const RAM_BYTES: u64 = 512 << 20;
/// What query-gmem's sentence about the DMA path names.
const REASON: &str = "IOMMU_IOAS_MAP_FILE";

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&NVME)?;
    let ioctls = Ioctls::start()?;
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
            &format!("vfio-pci,host={device},iommufd=iommufd0"),
        ],
        "lab.job=nvme",
    )?;
    let result = guest.result()?;
    for name in ["read_bytes", "read_sha256", "write_bytes", "write_sha256"] {
        scenario.fact(name, result[name].clone());
    }
    scenario.progress("disk read, changed and written");

    let pid = guest.machine.pid();
    let mapping = backing(pid, RAM_BYTES)?;
    scenario.check(
        mapping.is_guest_memfd(),
        "the mapping behind RAM is of a guest_memfd",
    )?;
    let calls = ioctls.by_command(&threads(pid)?)?;
    let count = |command| calls.get(&command).copied().unwrap_or(0);
    scenario.fact("kernel_map_file_calls", count(IOMMU_IOAS_MAP_FILE));
    scenario.fact("kernel_map_address_calls", count(IOMMU_IOAS_MAP));
    scenario.fact("kernel_unmap_calls", count(IOMMU_IOAS_UNMAP));
    let by_address: u64 = ioctls
        .maps_by_address()?
        .iter()
        .filter(|map| map.touches(&mapping.addresses))
        .map(|map| map.length)
        .sum();
    scenario.fact("kernel_ram_bytes_mapped_by_address", by_address);

    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    let block = gmem.block("ram0")?;
    let path = block.text("dma-path")?;
    scenario.fact("dma_path", path);
    scenario.fact("dma_strategy", block.text("dma-strategy")?);
    scenario.fact("dma_mapped_bytes", block.number("dma-mapped")?);
    scenario.fact("dma_areas", block.number("dma-areas")?);
    scenario.check_equal(block.text("dma-strategy")?, "whole", "the DMA strategy")?;
    scenario.check(
        block.number("dma-mapped")? > RAM_BYTES / 2,
        "most of RAM is mapped for the device",
    )?;
    match path {
        "address" => scenario.check(
            by_address >= block.number("dma-mapped")?,
            "the kernel saw RAM being mapped by address, as query-gmem says",
        )?,
        "fd" => scenario.check(
            by_address == 0 && count(IOMMU_IOAS_MAP_FILE) > 0,
            "the kernel saw RAM being mapped by file, as query-gmem says",
        )?,
        _ => scenario.check(false, format!("DMA path {path} is fd or address"))?,
    }
    if path == "address" {
        let reason = block.text("dma-path-reason")?;
        scenario.check(
            reason.contains(REASON),
            format!("query-gmem says why the DMA path is {path}: {reason}"),
        )?;
        scenario.fact("dma_path_reason", reason);
    }
    guest.machine.is_silent()?;
    guest.finish()
}
