// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calls that map and unmap, counted, and how a mapping names memory.
//!
//! Invariant: which way works is found out once for a window, by its first mapping, and none but that one
//! is tried both ways. Nothing here changes the books.

use super::Window;
use crate::attributes::Attribute;
use crate::dma::DmaPath;
use crate::error::{Doing, Result};
use crate::kernel::CallResult;
use crate::throttle::limited;
use crate::units::{Iova, Span};

impl Window {
    pub(super) fn unmap(&self, iovas: Span<Iova>) -> CallResult<()> {
        self.counters.unmap_calls.add(1);
        self.kernel.dma_unmap(self.ioas(), iovas)
    }

    pub(super) fn map(&self, area: Span<Iova>) -> Result<()> {
        self.map_on(self.path(), area)
    }

    pub(super) fn map_on(&self, path: DmaPath, area: Span<Iova>) -> Result<()> {
        let mut result = self.map_by(path, area);
        if path == DmaPath::Auto {
            let by_address = matches!(&result, Err(call) if call.errno == libc::EINVAL);
            if by_address {
                // memfd_pin_folios takes shmem and hugetlbfs files only (Linux 7.3). A reserved
                // IOVA is EINVAL too, but by address as well: then nothing has been found out.
                result = self.map_by(DmaPath::Address, area);
            }
            if result.is_ok() {
                self.found_path(by_address);
            }
        }
        result.doing(|| {
            format!(
                "mapping {} for devices at {area} of IOAS {}",
                self.offsets(area),
                self.ioas_id
            )
        })
    }

    fn found_path(&self, by_address: bool) {
        let backing = self.planes.backing();
        if by_address {
            self.state().path = DmaPath::Address;
            limited!(
                info,
                "DMA to this {backing} block goes by address: the kernel refuses to pin its file \
                 (IOMMU_IOAS_MAP_FILE: EINVAL)"
            );
        } else {
            self.state().path = DmaPath::Fd;
            limited!(info, "DMA to this {backing} block goes by fd");
        }
    }

    pub(super) fn map_by(&self, path: DmaPath, area: Span<Iova>) -> CallResult<()> {
        let offsets = self.offsets(area);
        match path {
            DmaPath::Auto | DmaPath::Fd => {
                let file = self.planes.file(Attribute::Shared);
                self.kernel
                    .dma_map_file(self.ioas(), file, offsets, area.start(), self.access)?;
                self.counters.map_file_calls.add(1);
            }
            DmaPath::Address => {
                let mapping = self.planes.mapping();
                self.kernel.dma_map_address(
                    self.ioas(),
                    mapping,
                    offsets,
                    area.start(),
                    self.access,
                )?;
                self.counters.map_address_calls.add(1);
            }
        }
        Ok(())
    }
}
