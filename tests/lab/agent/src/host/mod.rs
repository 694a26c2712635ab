// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel of L1 knows, asked without going through QEMU: mappings, files, page counts, ioctls, faults, devices.

pub mod cgroup;
pub mod conversions;
pub mod engine;
pub mod faults;
pub mod files;
pub mod gdb;
pub mod huge_pages;
pub mod iommufd;
pub mod kernel;
pub mod mapped_sizes;
pub mod memory;
pub mod memory_errors;
pub mod messages;
pub mod nodes;
pub mod pages;
pub mod passthrough;
pub mod pins;
pub mod programs;
pub mod shared_pages;
pub mod storage_daemon;
pub mod system_calls;
pub mod tee;
pub mod tracing;
pub mod vdpa;
pub mod vfio_user;
