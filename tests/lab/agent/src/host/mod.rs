// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel of L1 knows, asked without going through QEMU: mappings, files, page counts, ioctls, faults, devices.

pub mod faults;
pub mod huge_pages;
pub mod iommufd;
pub mod kernel;
pub mod memory;
pub mod messages;
pub mod nodes;
pub mod pages;
pub mod passthrough;
pub mod programs;
pub mod tracing;
