// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's stand-in for SNP and TDX (kernel-patches/0009): switched on for as long as somebody holds it, told to fail, and asked
//! what KVM thinks of each page of a guest.

use crate::failure::{Attempt, Failure};
use std::fs;
use std::ops::Range;

const OFFERED: &str = "/sys/module/kvm/parameters/lab_tee";
const FAILURE: &str = "/sys/module/kvm/parameters/lab_tee_fail";
const GUESTS: &str = "/sys/kernel/debug/kvm";
const PAGE_BITS: u32 = 12;

/// Bits of what is offered.
pub const SNP: u32 = 1;
pub const TDX: u32 = 2;

/// KVM offers such guests until it is dropped; what was to fail fails no more then.
pub struct Offered(String);

impl Offered {
    pub fn kinds(bits: u32) -> Result<Self, Failure> {
        let before = fs::read_to_string(OFFERED).attempt(|| {
            format!("reading {OFFERED}: the kernel needs the lab's patch 0009 to offer SNP and TDX guests")
        })?;
        fs::write(OFFERED, bits.to_string()).attempt(|| format!("writing {bits} to {OFFERED}"))?;
        Ok(Self(before))
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        let _ = fs::write(FAILURE, "none");
        let _ = fs::write(OFFERED, self.0.trim());
    }
}

/// The `nth` command of this name from now on (1 is the next one) fails with this error; names are those of QEMU's side, as
/// `snp-launch-update`.
#[allow(dead_code)]
pub fn fail(command: &str, nth: u32, errno: i32) -> Result<(), Failure> {
    let order = format!("{command},{nth},{errno}");
    fs::write(FAILURE, &order).attempt(|| format!("writing {order} to {FAILURE}"))
}

/// What is left of such an order: nothing, once the command has failed.
#[allow(dead_code)]
pub fn failure_left() -> Result<String, Failure> {
    let text = fs::read_to_string(FAILURE).attempt(|| format!("reading {FAILURE}"))?;
    let text = text.trim();
    Ok(if text == "none" { "" } else { text }.to_string())
}

/// What KVM thinks of a guest.
#[derive(Debug, PartialEq)]
pub struct View {
    /// `snp` or `tdx`, and how far the launch is: `created`, `started` or `finished`.
    pub kind: String,
    pub state: String,
    /// Every page that a slot has, in order.
    pub runs: Vec<Run>,
    /// Ranges to which accesses are of one kind whatever their attributes: whether that is private.
    pub by_range: Vec<(Range<u64>, bool)>,
}

/// Neighbouring pages that are alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub addresses: Range<u64>,
    pub private: bool,
    /// Added by a launch command.
    pub launched: bool,
}

impl View {
    /// Of the guest that a QEMU runs.
    pub fn of(pid: u32) -> Result<Self, Failure> {
        let entries = fs::read_dir(GUESTS).attempt(|| format!("reading {GUESTS}"))?;
        let prefix = format!("{pid}-");
        let mut views = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with(&prefix)
            })
            .filter_map(|path| fs::read_to_string(path.join("lab_tee")).ok());
        match (views.next(), views.next()) {
            (Some(text), None) => Self::parse(&text)
                .attempt(|| format!("KVM's view of a guest is not as it should be: {text}")),
            (None, _) => Err(Failure::new(format!(
                "KVM shows no SNP or TDX guest of process {pid}"
            ))),
            // One that was rebuilt, and is still held by somebody.
            _ => Err(Failure::new(format!(
                "KVM shows more than one guest of process {pid}"
            ))),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let mut first = lines.next()?.strip_prefix("vm ")?.split(' ');
        let mut view = Self {
            kind: first.next()?.to_string(),
            state: first.next()?.to_string(),
            runs: Vec::new(),
            by_range: Vec::new(),
        };
        for line in lines {
            let words: Vec<_> = line.split(' ').collect();
            let addresses = || {
                let start = u64::from_str_radix(words.get(1)?, 16).ok()?;
                let count = u64::from_str_radix(words.get(2)?, 16).ok()?;
                Some(start << PAGE_BITS..start.checked_add(count)? << PAGE_BITS)
            };
            let private = match *words.get(3)? {
                "private" => true,
                "shared" => false,
                _ => return None,
            };
            match (words[0], words.get(4)) {
                ("pages", Some(kind @ (&"launched" | &"plain"))) => view.runs.push(Run {
                    addresses: addresses()?,
                    private,
                    launched: *kind == "launched",
                }),
                ("kind", None) => view.by_range.push((addresses()?, private)),
                _ => return None,
            }
        }
        Some(view)
    }

    /// Where pages are that a launch command added, as long runs.
    pub fn launched(&self) -> Vec<Range<u64>> {
        let launched = self.runs.iter().filter(|run| run.launched);
        joined(launched.map(|run| run.addresses.clone()))
    }
}

/// Runs in order, with neighbours as one.
pub fn joined(runs: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match all.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => all.push(run),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::{joined, View};
    use std::slice::from_ref;

    #[test]
    fn a_view_is_read_line_by_line() {
        let text = "vm snp finished\npages 0 200 private plain\npages 200 200 shared plain\npages 400 1 private plain\n\
                    pages 401 2 private launched\nkind 500 10 shared\n";
        let view = View::parse(text).unwrap();
        assert_eq!(
            (view.kind.as_str(), view.state.as_str()),
            ("snp", "finished")
        );
        let private = view.runs.iter().filter(|run| run.private);
        let private = joined(private.map(|run| run.addresses.clone()));
        assert_eq!(private, [0..0x20_0000, 0x40_0000..0x40_3000]);
        assert_eq!(view.launched(), from_ref(&(0x40_1000..0x40_3000)));
        assert_eq!(view.by_range, [(0x50_0000..0x51_0000, false)]);
    }

    #[test]
    fn a_view_that_is_not_understood_is_none() {
        for text in [
            "",
            "vm tdx\n",
            "vm tdx created\npages 0 200 secret plain\n",
            "vm tdx created\npages 0 200 private\n",
            "vm tdx created\npages 0 x private plain\n",
            "vm tdx created\nother 0 1 private plain\n",
        ] {
            assert!(View::parse(text).is_none(), "{text}");
        }
    }
}
