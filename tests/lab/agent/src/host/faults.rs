// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's fault injection, aimed: allocations fail in one thread, and only under functions of one's choice.
//!
//! `fail-nth` (Documentation/fault-injection) counts the allocations that pass the filter and fails one of them, so that
//! a loop over the number fails each allocation of a system call in turn.

use crate::failure::{Attempt, Failure};
use std::fs;

const DEBUGFS: &str = "/sys/kernel/debug";
/// Slab allocations, and pages for what is not in a slab: IOMMU page tables, guest memory.
const ATTRIBUTES: [&str; 2] = ["failslab", "fail_page_alloc"];

/// Allocations under one function can be made to fail. None does after it was dropped.
pub struct Faults(());

impl Faults {
    /// Aims at what is allocated on behalf of `function`. One aim at a time.
    pub fn under(function: &str) -> Result<Self, Failure> {
        let (start, end) = code(function)?;
        for attribute in ATTRIBUTES {
            set(attribute, "verbose", "0")?;
            // By default whatever may sleep is spared.
            set(attribute, "ignore-gfp-wait", "N")?;
            set(attribute, "stacktrace-depth", "32")?;
            set(attribute, "require-start", &start.to_string())?;
            set(attribute, "require-end", &end.to_string())?;
            set(attribute, "task-filter", "Y")?;
            set(attribute, "times", "-1")?;
            set(attribute, "interval", "1")?;
            set(attribute, "probability", "0")?;
        }
        set("fail_page_alloc", "min-order", "0")?;
        set("fail_page_alloc", "ignore-gfp-highmem", "N")?;
        Ok(Self(()))
    }

    /// The `number`th allocation that the thread makes from now on fails, counted from 1.
    pub fn fail_nth(&self, thread: u32, number: u32) -> Result<(), Failure> {
        let path = nth(thread);
        fs::write(&path, number.to_string()).attempt(|| format!("writing {path}"))
    }

    /// Whether it has failed. None will afterwards.
    pub fn failed(&self, thread: u32) -> Result<bool, Failure> {
        let path = nth(thread);
        let left = fs::read_to_string(&path).attempt(|| format!("reading {path}"))?;
        self.fail_nth(thread, 0)?;
        Ok(left.trim() == "0")
    }

    /// How many bytes of slab, and how many pages, can still be allocated once all allocations fail.
    pub fn spare(&self, bytes: u64) -> Result<(), Failure> {
        set("failslab", "space", &bytes.to_string())?;
        set("fail_page_alloc", "space", &(bytes / 256).to_string())
    }

    /// Of the slab allocations that are to fail only the next so many do; all others that would are well.
    pub fn at_most(&self, number: u32) -> Result<(), Failure> {
        set("failslab", "times", &number.to_string())?;
        set("fail_page_alloc", "times", "0")
    }

    /// Whether they have failed.
    pub fn are_over(&self) -> Result<bool, Failure> {
        let path = format!("{DEBUGFS}/failslab/times");
        let left = fs::read_to_string(&path).attempt(|| format!("reading {path}"))?;
        Ok(left.trim() == "0")
    }

    /// From now on all of these threads' allocations fail, or none.
    pub fn fail_all(&self, threads: &[u32], fail: bool) -> Result<(), Failure> {
        for thread in threads {
            let path = format!("/proc/{thread}/make-it-fail");
            fs::write(&path, if fail { "1" } else { "0" }).attempt(|| format!("writing {path}"))?;
        }
        for attribute in ATTRIBUTES {
            set(attribute, "probability", if fail { "100" } else { "0" })?;
        }
        Ok(())
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        for attribute in ATTRIBUTES {
            let _ = set(attribute, "probability", "0");
            let _ = set(attribute, "space", "0");
            // The whole of memory is no filter, which is what it was.
            let _ = set(attribute, "require-start", "0");
            let _ = set(attribute, "require-end", &u64::MAX.to_string());
            let _ = set(attribute, "ignore-gfp-wait", "Y");
        }
    }
}

fn nth(thread: u32) -> String {
    format!("/proc/{thread}/fail-nth")
}

fn set(attribute: &str, name: &str, value: &str) -> Result<(), Failure> {
    let path = format!("{DEBUGFS}/{attribute}/{name}");
    fs::write(&path, value).attempt(|| format!("writing {value} to {path}"))
}

/// The addresses of a kernel function's code.
fn code(function: &str) -> Result<(u64, u64), Failure> {
    let text = fs::read_to_string("/proc/kallsyms").attempt(|| "reading /proc/kallsyms".into())?;
    range(&text, function).attempt(|| format!("the kernel has no function {function}"))
}

/// From the function's symbol to the next one; they are in the order of their addresses.
fn range(kallsyms: &str, function: &str) -> Option<(u64, u64)> {
    let mut symbols = kallsyms.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let kind = words.next()?;
        (kind.eq_ignore_ascii_case("t")).then_some((address, words.next()?))
    });
    let (start, _) = symbols.find(|(_, name)| *name == function)?;
    let (end, _) = symbols.find(|(address, _)| *address > start)?;
    Some((start, end))
}

#[cfg(test)]
mod tests {
    use super::range;

    #[test]
    fn a_function_ends_where_the_next_begins() {
        let text =
            "ffffffff81000000 T first\nffffffff81000040 t second\nffffffff81000040 t alias\n\
            ffffffff81000048 d data\nffffffff81000080 T third\n";
        let found = range(text, "second").unwrap();
        assert_eq!(found, (0xffff_ffff_8100_0040, 0xffff_ffff_8100_0080));
        assert_eq!(range(text, "third"), None);
        assert_eq!(range(text, "fourth"), None);
    }
}
