// SPDX-License-Identifier: MIT OR Apache-2.0
//! SNP and TDX guests: how one is started, and what it holds then.
//!
//! A scenario is run with each kind; its name begins with it. It asks for a [`Host`], which offers that kind for as long as it
//! lives, and starts guests by a [`Launch`]:
//!
//! ```ignore
//! let host = Host::of(scenario)?;
//! let mut guest = Launch::new(&host, 64 * MIB).vcpus(4).start(scenario.directory())?;
//! guest.agree(scenario, "at start")?;            // all is private but what the firmware opens: guest, QEMU, kernel and KVM
//! guest.convert(scenario, gpa, bytes, false)?;   // by the port call; the ledger follows
//! ```
//!
//! The ledger of such a guest begins private, again after `ledger.reset()`, and what is plugged into it is private too.

use crate::confidential::Confidential;
use crate::failure::{Attempt, Failure};
use crate::host::tee::{self, Offered};
use crate::ledger::{Block, Ledger, PAGE};
use crate::machine::Surroundings;
use crate::scenario::Scenario;
use std::fs;
use std::ops::Range;
use std::path::Path;

#[allow(dead_code)]
#[path = "../../payload/src/handover.rs"]
pub mod handover;

const TOP: u64 = 1 << 32;

/// What the firmware shares before anything else.
pub const OPEN: Range<u64> = handover::SHARED_BEGIN as u64..handover::SHARED_END as u64;

/// QEMU's own memory for option ROMs, over that of the block: private as well. A TD has none.
pub const ROM: Range<u64> = 0xc_0000..0xe_0000;

/// The kinds that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Snp,
    Tdx,
}

impl Kind {
    /// The kind that a scenario's name begins with.
    pub fn named(scenario: &str) -> Option<Self> {
        match scenario.split_once('-')?.0 {
            "snp" => Some(Self::Snp),
            "tdx" => Some(Self::Tdx),
            _ => None,
        }
    }

    /// As KVM's view calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Snp => "snp",
            Self::Tdx => "tdx",
        }
    }

    fn bit(self) -> u32 {
        match self {
            Self::Snp => tee::SNP,
            Self::Tdx => tee::TDX,
        }
    }

    /// The object that makes a guest one of this kind. An emulated host has no C-bit to tell of.
    pub fn object(self) -> &'static str {
        match self {
            Self::Snp => "sev-snp-guest,id=cgs0,cbitpos=0,reduced-phys-bits=1",
            Self::Tdx => "tdx-guest,id=cgs0",
        }
    }

    /// Firmware with the payload in it.
    pub fn firmware(self) -> &'static str {
        match self {
            Self::Snp => "/lab/l2/snp.fd",
            Self::Tdx => "/lab/l2/tdx.fd",
        }
    }

    /// Where the firmware is in the guest's memory. All of it is added by the launch.
    pub fn firmware_range(self) -> Result<Range<u64>, Failure> {
        let file = self.firmware();
        let bytes = fs::metadata(file)
            .attempt(|| format!("looking at {file}"))?
            .len();
        Ok(TOP - bytes..TOP)
    }

    /// Memory of QEMU's own that holds no RAM: firmware and ROMs.
    pub fn others(self) -> Result<Vec<Range<u64>>, Failure> {
        let firmware = self.firmware_range()?;
        Ok(match self {
            Self::Snp => vec![ROM, firmware],
            Self::Tdx => vec![firmware],
        })
    }

    /// What the launch adds of RAM, in order.
    pub fn launched(self) -> Vec<Range<u64>> {
        let pages = match self {
            Self::Snp => handover::SNP_PAGES,
            Self::Tdx => handover::TDX_PAGES,
        };
        let ranges = pages.iter().map(|&(address, bytes, _)| {
            let start = u64::from(address);
            start..start + u64::from(bytes)
        });
        tee::joined(ranges)
    }
}

/// L1 as a host of one kind of guest.
pub struct Host {
    pub kind: Kind,
    _offered: Offered,
}

impl Host {
    /// For the kind that the scenario's name begins with.
    pub fn of(scenario: &Scenario) -> Result<Self, Failure> {
        let kind = Kind::named(scenario.name())
            .attempt(|| format!("{} does not begin with snp- or tdx-", scenario.name()))?;
        let _offered = Offered::kinds(kind.bit())?;
        Ok(Self { kind, _offered })
    }
}

/// A guest to start.
pub struct Launch<'a> {
    kind: Kind,
    ram_bytes: u64,
    blocks: Option<(Vec<Block>, u64)>,
    object: String,
    properties: String,
    machine: String,
    ours: bool,
    arguments: Vec<String>,
    surroundings: Surroundings<'a>,
}

// Memory, devices and failures have scenarios of their own.
#[allow(dead_code)]
impl<'a> Launch<'a> {
    /// With one block `ram0` of that many bytes, all below 4 GiB, and one processor.
    pub fn new(host: &'a Host, ram_bytes: u64) -> Self {
        Self {
            kind: host.kind,
            ram_bytes,
            blocks: None,
            object: host.kind.object().into(),
            properties: String::new(),
            machine: "memory-backend=ram0".into(),
            ours: true,
            arguments: Vec::new(),
            surroundings: Surroundings::default(),
        }
    }

    /// More properties of `ram0`, each with its comma in front.
    pub fn properties(mut self, properties: &str) -> Self {
        self.properties += properties;
        self
    }

    /// More properties of the object that makes it confidential, likewise.
    pub fn guest_properties(mut self, properties: &str) -> Self {
        self.object += properties;
        self
    }

    /// More properties of the machine, likewise.
    pub fn machine(mut self, properties: &str) -> Self {
        self.machine += properties;
        self
    }

    /// RAM is of these blocks, whose objects and nodes are among the arguments, in place of `ram0`; what is beyond the first `low`
    /// bytes is above 4 GiB.
    pub fn blocks(mut self, blocks: Vec<Block>, low: u64) -> Self {
        self.ram_bytes = blocks.iter().map(|block| block.bytes).sum();
        self.blocks = Some((blocks, low));
        self.machine.clear();
        self
    }

    /// How many processors; the payload uses up to 4.
    pub fn vcpus(self, count: u32) -> Self {
        self.arguments(&["-smp", &count.to_string()])
    }

    /// More arguments of QEMU.
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments
            .extend(arguments.iter().map(|word| word.to_string()));
        self
    }

    pub fn surroundings(mut self, surroundings: Surroundings<'a>) -> Self {
        self.surroundings = surroundings;
        self
    }

    /// On QEMU's own memory-backend-memfd, to compare with. Where kernels convert in place it has none.
    pub fn stock(mut self) -> Self {
        self.ours = false;
        self
    }

    /// QEMU's arguments, for who starts it otherwise.
    pub fn words(&self) -> Vec<String> {
        let mut words: Vec<String> = ["-bios", self.kind.firmware(), "-object", &self.object]
            .map(String::from)
            .into();
        let bytes = self.ram_bytes;
        if self.blocks.is_none() {
            let backend = match self.ours {
                true => "memory-backend-gmem",
                false => "memory-backend-memfd,share=on",
            };
            words.push("-object".into());
            words.push(format!("{backend},id=ram0,size={bytes}{}", self.properties));
        }
        let comma = if self.machine.is_empty() || self.machine.starts_with(',') {
            ""
        } else {
            ","
        };
        words.extend(["-m".into(), format!("{}M", bytes >> 20), "-machine".into()]);
        words.push(format!(
            "q35,accel=kvm,confidential-guest-support=cgs0{comma}{}",
            self.machine
        ));
        words.extend(self.arguments.iter().cloned());
        words
    }

    /// What it is to hold when it runs.
    pub fn ledger(&self) -> Ledger {
        let ledger = match &self.blocks {
            None => Ledger::new(vec![Block::small("ram0", self.ram_bytes)]),
            Some((blocks, low)) => Ledger::with_hole(blocks.clone(), *low),
        };
        ledger.private_but(OPEN)
    }

    /// Starts it; the payload is ready then.
    pub fn start(self, directory: &Path) -> Result<Confidential, Failure> {
        let words = self.words();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let ledger = self.ledger();
        Confidential::launch_in(
            directory,
            self.kind,
            self.ours,
            &words,
            ledger,
            self.surroundings,
        )
    }
}

/// Whether a page of the block's is behind something else of a PC's, in the last part of the first megabyte.
pub fn is_hidden(gpa: u64) -> bool {
    (0xa_0000..0x10_0000).contains(&gpa)
}

/// A range of whole pages, page by page.
pub fn pages(range: &Range<u64>) -> impl Iterator<Item = u64> {
    range.clone().step_by(PAGE as usize)
}

#[cfg(test)]
mod tests {
    use super::Kind;
    use std::slice::from_ref;

    #[test]
    fn a_scenarios_name_begins_with_its_kind() {
        assert_eq!(Kind::named("snp-launch"), Some(Kind::Snp));
        assert_eq!(Kind::named("tdx-reset"), Some(Kind::Tdx));
        assert_eq!(Kind::named("dump"), None);
        assert_eq!(Kind::named("snapshot-x"), None);
    }

    #[test]
    fn what_a_launch_adds_is_known() {
        assert_eq!(Kind::Snp.launched(), from_ref(&(0x80_0000..0x80_9000)));
        assert_eq!(Kind::Tdx.launched(), from_ref(&(0x80_9000..0x80_d000)));
    }
}
