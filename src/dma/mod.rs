// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which devices reach which shared bytes.
//!
//! A [`Window`] shows a range of a block in one IOAS: a [`view`]. It keeps a [`ledger`] of the areas that the
//! kernel has there, and asks a [`strategy`] in which pieces to map and unmap. Its addresses are its own:
//! [`claims`] knows whose any address of an IOAS is.

mod claims;
mod context;
mod ledger;
mod neighbours;
mod seams;
pub(crate) mod strategy;
mod view;
mod window;

use crate::error::Result;
use crate::kernel::linux::Linux;
use std::os::fd::AsFd;

pub(crate) use neighbours::{Neighbours, Taken};
pub use strategy::StrategyKind;
pub(crate) use strategy::PIECE;
pub use view::WindowConfig;
pub(crate) use window::{Window, WindowParts};

/// How a device's mappings name memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DmaPath {
    /// By file and offset where the kernel takes the file, else by address.
    #[default]
    Auto,
    /// By file and offset only (IOMMU_IOAS_MAP_FILE).
    Fd,
    /// By address only (IOMMU_IOAS_MAP).
    Address,
}

/// How windows of a block with private pages are to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaSplit {
    /// Cut where that works; else by a unit if one is given, else page by page.
    Auto {
        /// A power of two, at least a page. Naming it accepts [`StrategyKind::Unit`]'s faults.
        unit: Option<u64>,
    },
    /// Map large, unmap any part. Needs an IOAS that was [prepared](prepare_ioas).
    Cut,
    /// Map in areas of a unit at most: a power of two, at least a page. When a part of one becomes
    /// private, all of it is unmapped and the rest mapped again: devices that touch the rest
    /// meanwhile fault.
    Unit(u64),
    /// Map page by page.
    Page,
}

impl Default for DmaSplit {
    fn default() -> Self {
        DmaSplit::Auto { unit: None }
    }
}

impl DmaSplit {
    /// The unit of areas that a window may get.
    pub(crate) fn unit(self) -> Option<u64> {
        match self {
            DmaSplit::Unit(bytes) => Some(bytes),
            DmaSplit::Auto { unit } => unit,
            DmaSplit::Cut | DmaSplit::Page => None,
        }
    }
}

/// Makes a new IOAS fit for windows that are cut ([`StrategyKind::Cut`]): its mappings are of
/// single pages in the IOMMU (IOMMU_OPTION_HUGE_PAGES = 0), and so any part of one can be unmapped
/// by itself. Devices' IOTLBs then hold 4 KiB entries, as they do when memory is mapped page by
/// page. To be called between IOMMU_IOAS_ALLOC and the first mapping. May block in the kernel;
/// takes no lock of the library.
///
/// # Errors
/// - ENOTTY, or what else that file answers: it is no iommufd.
/// - ENOENT: it has no such IOAS.
/// - EINVAL: too late: devices are attached to the IOAS, and something is mapped
///   (iopt_disable_large_pages).
///
/// Nothing changed then, and windows there take another strategy or, if [`DmaSplit::Cut`] was asked
/// for, fail.
pub fn prepare_ioas(iommufd: impl AsFd, ioas_id: u32) -> Result<()> {
    context::prepare(&Linux, iommufd.as_fd(), ioas_id)
        .map_err(|error| error.of_iommufd().of(&format!("IOAS {ioas_id}")))
}
