// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which devices reach which shared bytes.
//!
//! A [`Window`] shows a range of a block in one IOAS. It keeps a [`ledger`] of the areas that the
//! kernel has there, and asks a [`strategy`] in which pieces to map and unmap.

mod ledger;
pub(crate) mod strategy;
mod window;

pub use strategy::StrategyKind;
pub(crate) use window::WindowParts;
pub use window::{Window, WindowConfig};

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DmaSplit {
    /// The best that works.
    #[default]
    Auto,
    /// Map large, unmap any part: not in this version.
    Cut,
    /// Map by a unit of several pages: not in this version.
    Unit,
    /// Map page by page.
    Page,
}
