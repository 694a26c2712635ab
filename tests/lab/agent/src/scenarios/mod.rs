// SPDX-License-Identifier: MIT OR Apache-2.0
//! One file per scenario, one line per scenario here.

mod address_map;
mod all_private_start;
mod as_a_host;
mod bad_requests;
mod balloon;
mod balloon_linux;
mod clock_page;
mod confidential_convert;
mod confidential_image;
mod confidential_vfio_edu;
mod cut;
mod debugger;
mod device;
mod device_disk;
mod direct_map;
mod dump;
mod faults;
mod hot_plug;
mod huge_convert;
mod hugetlb;
mod in_place_pinned;
mod io_threads;
mod kernel_selftests;
mod layout;
mod many_runs;
mod memory_error;
mod memory_hot_plug;
mod no_attributes;
mod numa;
mod ordinary_linux;
mod ordinary_payload;
mod ordinary_small;
mod ordinary_vfio_nvme;
mod queries;
mod random_life;
mod rebuild_life;
mod rebuild_nvme;
mod rebuild_pins;
mod refusals;
mod reset_in_flight;
mod reset_rebuild;
mod rollback;
mod stock_linux;
mod suspend;
mod system_reset;
mod tdx_retry;
mod tee_convert;
mod tee_failures;
mod tee_implicit;
mod tee_launch;
mod tee_memory;
mod tee_reset;
mod timings;
mod two_vcpus;
mod vhost_net;
mod vhost_user;

use crate::bench;
use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::scenario::{Outcome, Scenario};

/// A scenario: it records facts and ends at the first check that does not hold.
pub type Body = fn(&mut Scenario, &CommandLine) -> Outcome;

/// Those called `…-at-once` and `…-late` are the same with another [`Release`](crate::release::Release).
const SCENARIOS: &[(&str, Body)] = &[
    ("stock-linux", stock_linux::run),
    ("as-a-host", as_a_host::run),
    ("ordinary-linux", ordinary_linux::run),
    ("ordinary-vfio-nvme", ordinary_vfio_nvme::run),
    ("confidential-convert", confidential_convert::run),
    ("confidential-vfio-edu", confidential_vfio_edu::run),
    ("bad-requests", bad_requests::run),
    ("system-reset", system_reset::run),
    ("address-map", address_map::run),
    ("hot-plug", hot_plug::run),
    ("hot-plug-at-once", hot_plug::run),
    ("hot-plug-late", hot_plug::run),
    ("memory-hot-plug", memory_hot_plug::run),
    ("dump", dump::run),
    ("cut", cut::run),
    ("cut-at-once", cut::run),
    ("cut-late", cut::run),
    ("two-vcpus", two_vcpus::run),
    ("hugetlb", hugetlb::run),
    ("layout", layout::run),
    ("numa", numa::run),
    ("reset-rebuild", reset_rebuild::run),
    ("reset-in-flight", reset_in_flight::run),
    ("suspend", suspend::run),
    ("rebuild-life", rebuild_life::run),
    ("rebuild-pins", rebuild_pins::run),
    ("rebuild-nvme", rebuild_nvme::run),
    ("rollback", rollback::run),
    ("rollback-at-once", rollback::run),
    ("rollback-late", rollback::run),
    ("inplace-pinned", in_place_pinned::run),
    ("huge-convert", huge_convert::run),
    ("all-private-start", all_private_start::run),
    ("memory-error", memory_error::run),
    ("faults", faults::run),
    ("direct-map", direct_map::run),
    ("clock-page", clock_page::run),
    ("random-life", random_life::run),
    ("no-attributes", no_attributes::run),
    ("many-runs", many_runs::run),
    ("queries", queries::run),
    ("debugger", debugger::run),
    ("refusals", refusals::run),
    ("balloon", balloon::run),
    ("balloon-linux", balloon_linux::run),
    ("io-threads", io_threads::run),
    ("vhost-net", vhost_net::run),
    ("vhost-user", vhost_user::run),
    ("ordinary-small", ordinary_small::run),
    ("ordinary-payload", ordinary_payload::run),
    ("timings", timings::run),
    ("device", device::run),
    ("device-disk", device_disk::run),
    ("confidential-image", confidential_image::run),
    ("snp-launch", tee_launch::run),
    ("tdx-launch", tee_launch::run),
    ("snp-convert", tee_convert::run),
    ("tdx-convert", tee_convert::run),
    ("snp-retry", tdx_retry::run),
    ("tdx-retry", tdx_retry::run),
    ("snp-implicit", tee_implicit::run),
    ("tdx-implicit", tee_implicit::run),
    ("snp-reset", tee_reset::run),
    ("tdx-reset", tee_reset::run),
    ("snp-failures", tee_failures::run),
    ("tdx-failures", tee_failures::run),
    ("snp-memory", tee_memory::run),
    ("tdx-memory", tee_memory::run),
    ("kernel-selftests", kernel_selftests::run),
];

/// Those that are no benchmarks.
pub fn names() -> Vec<&'static str> {
    SCENARIOS.iter().map(|(name, _)| *name).collect()
}

/// The body of the scenario called `name`.
pub fn find(name: &str) -> Result<Body, Failure> {
    SCENARIOS
        .iter()
        .chain(bench::SCENARIOS)
        .find(|(known, _)| *known == name)
        .map(|(_, body)| *body)
        .attempt(|| {
            let known: Vec<_> = SCENARIOS.iter().map(|(name, _)| *name).collect();
            format!(
                "there is no scenario {name}; there are: {}",
                known.join(", ")
            )
        })
}
