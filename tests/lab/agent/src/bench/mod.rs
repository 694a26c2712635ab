// SPDX-License-Identifier: MIT OR Apache-2.0
//! The benchmark's half that runs in L1: stock QEMU's path, ours, and the same kernel calls made without a VMM, in turns.
//!
//! A scenario per workload. Its fact `cases` has one object per case, made of `figures`; the host's half holds them
//! against goals. Those of `planes` have facts of their own. Time is that from a hypercall's exit to re-entry (`times`), counts are the kernel's (`calls`).

mod attach;
mod calls;
mod cases;
mod contest;
mod figures;
mod guest;
mod kernel;
mod planes;
mod prealloc;
mod replay;
mod rings;
mod storm;
mod times;
mod workload;

use crate::scenarios::Body;

/// By the names that the host's half knows.
pub const SCENARIOS: &[(&str, Body)] = &[
    ("bench-share-1g", cases::share_1g),
    ("bench-snp-128m", cases::snp_128m),
    ("bench-tdx-boot", cases::tdx_boot),
    ("bench-snp-boot", cases::snp_boot),
    ("bench-page-churn", cases::page_churn),
    ("bench-churn-in-large", cases::churn_in_large),
    ("bench-attach", attach::run),
    ("bench-two-vcpus", cases::two_vcpus),
    ("bench-hugetlb-storm", storm::run),
    ("bench-prealloc", prealloc::run),
    ("bench-rings", rings::run),
    ("bench-inplace-convert", planes::convert),
    ("bench-inplace-library", planes::library),
    ("bench-inplace-footprint", planes::footprint),
    ("bench-inplace-access", planes::access),
];
