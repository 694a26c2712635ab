// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which kind of kernel this is.

use crate::failure::{Attempt, Failure};
use std::fs;

const IN_PLACE: &str = "/sys/module/kvm/parameters/gmem_in_place_conversion";
const FOREIGN: &str = "/sys/module/kvm/parameters/lab_foreign";
const MAPLE_FAULTS: &str = "/sys/module/maple_tree/parameters/lab_faults";
const PFN_CACHE: &str = "/sys/module/kvm/parameters/gmem_pfncache";
const NO_DIRECT_MAP: &str = "/sys/module/kvm/parameters/gmem_no_direct_map";

/// Whether confidential guests convert in place. A kernel that knows nothing of it does not.
pub fn in_place() -> bool {
    is_on(IN_PLACE)
}

/// Whether guest_memfds can be outside of the kernel's direct map.
pub fn no_direct_map() -> bool {
    is_on(NO_DIRECT_MAP)
}

/// Whether it has the patches of this lab, and so all that scenarios know of in-place kernels.
pub fn is_the_labs() -> bool {
    std::path::Path::new(FOREIGN).exists()
}

/// A bit for [`Foreign`].
pub const NO_VM_ATTRIBUTES: u32 = 8;

/// Has the lab's kernel do things as others do, until it is dropped: see kernel-patches/0008.
pub struct Foreign(String);

/// Has the kernel's maple tree have faults that it was cured of, until it is dropped: see kernel-patches/0007.
pub struct MapleFaults(String);

impl MapleFaults {
    /// `None` if this kernel can't.
    pub fn back(bits: u32) -> Result<Option<Self>, Failure> {
        Ok(set(MAPLE_FAULTS, bits)?.map(Self))
    }
}

impl Drop for MapleFaults {
    fn drop(&mut self) {
        let _ = fs::write(MAPLE_FAULTS, self.0.trim());
    }
}

/// Has the kernel find by the file what KVM itself writes to guest memory, or not, until it is dropped: see kernel-patches/0010.
pub struct PfnCache(String);

impl PfnCache {
    /// `None` if this kernel has no choice.
    pub fn by_file(on: bool) -> Result<Option<Self>, Failure> {
        Ok(set(PFN_CACHE, on.into())?.map(Self))
    }
}

impl Drop for PfnCache {
    fn drop(&mut self) {
        let _ = fs::write(PFN_CACHE, self.0.trim());
    }
}

/// Answers what it was, or nothing if there is no such parameter.
fn set(parameter: &str, bits: u32) -> Result<Option<String>, Failure> {
    let Ok(before) = fs::read_to_string(parameter) else {
        return Ok(None);
    };
    fs::write(parameter, bits.to_string()).attempt(|| format!("writing {bits} to {parameter}"))?;
    Ok(Some(before))
}

impl Foreign {
    /// `None` if this kernel can't.
    pub fn ways(bits: u32) -> Result<Option<Self>, Failure> {
        Ok(set(FOREIGN, bits)?.map(Self))
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = fs::write(FOREIGN, self.0.trim());
    }
}

fn is_on(parameter: &str) -> bool {
    fs::read_to_string(parameter).is_ok_and(|value| value.trim() == "Y")
}
