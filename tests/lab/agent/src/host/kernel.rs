// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which kind of kernel this is.

use std::fs;

const IN_PLACE: &str = "/sys/module/kvm/parameters/gmem_in_place_conversion";

/// Whether confidential guests convert in place. A kernel that knows nothing of it does not.
pub fn in_place() -> bool {
    fs::read_to_string(IN_PLACE).is_ok_and(|value| value.trim() == "Y")
}
