// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory errors on purpose: which page of the machine is behind a guest's page, and the kernel told that it is broken.

use crate::failure::{Attempt, Failure};
use std::fs;

const EVENT: &str = "/sys/kernel/tracing/events/kvmmmu/kvm_tdp_mmu_spte_changed";
const TRACE: &str = "/sys/kernel/tracing/trace";
const HWPOISON: &str = "/sys/kernel/debug/hwpoison";
/// The bits of an entry that are the page's address, and those that are set in one that maps a page.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;

/// Watches what KVM maps at one guest address, until it is dropped. The page is found whoever owns its file and whether
/// or not the host may look at it.
pub struct Watch {
    gpa: u64,
}

impl Watch {
    pub fn on(gpa: u64) -> Result<Self, Failure> {
        let watch = Self { gpa };
        write(
            &format!("{EVENT}/filter"),
            &format!("gfn == {:#x}", gpa >> 12),
        )?;
        write(TRACE, "")?;
        write(&format!("{EVENT}/enable"), "1")?;
        Ok(watch)
    }

    /// The number of the page that was mapped there last, by an entry for 4 KiB.
    pub fn page(&self) -> Result<u64, Failure> {
        let text = fs::read_to_string(TRACE).attempt(|| format!("reading {TRACE}"))?;
        last_page(&text, self.gpa >> 12).attempt(|| {
            format!(
                "KVM was not seen to map anything at {:#x}: {text}",
                self.gpa
            )
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = write(&format!("{EVENT}/enable"), "0");
        let _ = write(&format!("{EVENT}/filter"), "0");
    }
}

/// From lines that end in `as id 0 gfn 8000 level 1 old_spte 0 new_spte 6000001abcd0f77`, numbers hexadecimal.
fn last_page(trace: &str, gfn: u64) -> Option<u64> {
    trace
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let value = |name: &str| {
                let mut words = line.split_ascii_whitespace();
                words.find(|word| *word == name)?;
                u64::from_str_radix(words.next()?.trim_start_matches("0x"), 16).ok()
            };
            let entry = value("new_spte")?;
            (value("gfn")? == gfn && value("level")? == 1 && entry & PRESENT != 0)
                .then_some((entry & ADDRESS) >> 12)
        })
        .next_back()
}

/// Tells the kernel that a page is broken, as the machine would; the page is lost until `repair`.
pub fn inject(page: u64) -> Result<(), Failure> {
    write(&format!("{HWPOISON}/corrupt-pfn"), &format!("{page:#x}"))
}

/// The kernel may use the page again. Fails while somebody still has it, which harms no test.
pub fn repair(page: u64) -> bool {
    write(&format!("{HWPOISON}/unpoison-pfn"), &format!("{page:#x}")).is_ok()
}

fn write(path: &str, text: &str) -> Result<(), Failure> {
    fs::write(path, text).attempt(|| format!("writing {text} to {path}"))
}

#[cfg(test)]
mod tests {
    use super::last_page;

    #[test]
    fn the_page_is_that_of_the_last_small_entry() {
        let trace = "# tracer: nop\n\
            qemu-77 [000] ..... 1.0: kvm_tdp_mmu_spte_changed: as id 0 gfn 8000 level 1 old_spte 0 new_spte 6000001abcd0f77\n\
            qemu-77 [000] ..... 1.1: kvm_tdp_mmu_spte_changed: as id 0 gfn 8000 level 1 old_spte 6000001abcd0f77 new_spte 0\n\
            qemu-77 [000] ..... 1.2: kvm_tdp_mmu_spte_changed: as id 0 gfn 8001 level 1 old_spte 0 new_spte 6000001abcdff77\n";
        assert_eq!(last_page(trace, 0x8000), Some(0x1abcd0));
        assert_eq!(last_page(trace, 0x8002), None);
    }
}
