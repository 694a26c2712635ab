// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which kind of kernel this is.

use std::fs;

const IN_PLACE: &str = "/sys/module/kvm/parameters/gmem_in_place_conversion";
const NO_DIRECT_MAP: &str = "/sys/module/kvm/parameters/gmem_no_direct_map";

/// Whether confidential guests convert in place. A kernel that knows nothing of it does not.
pub fn in_place() -> bool {
    is_on(IN_PLACE)
}

/// Whether guest_memfds can be outside of the kernel's direct map.
pub fn no_direct_map() -> bool {
    is_on(NO_DIRECT_MAP)
}

fn is_on(parameter: &str) -> bool {
    fs::read_to_string(parameter).is_ok_and(|value| value.trim() == "Y")
}
