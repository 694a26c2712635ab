// SPDX-License-Identifier: MIT OR Apache-2.0
//! A confidential guest that runs the payload, with a ledger of what should be the case beside it.
//!
//! `agree` is the point: guest, QEMU and kernel are asked separately and must all say what the ledger says.

use crate::failure::Failure;
use crate::host::memory::{guest_memfds, memfds_of_ram, overlap, readable, SharedFile};
use crate::host::passthrough::{to_vfio, EDU};
use crate::host::tee::View;
use crate::host::{files, kernel, pages};
use crate::ledger::{Block, Ledger, PAGE};
use crate::lines::Lines;
use crate::machine::{Machine, Surroundings};
use crate::monitor::protocol::pattern;
use crate::monitor::Monitor;
use crate::place;
use crate::qmp::Gmem;
use crate::release::Release;
use crate::scenario::{Outcome, Scenario};
use crate::tee;
use std::collections::HashSet;
use std::ops::Range;
use std::os::fd::RawFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const EXIT_PATIENCE: Duration = Duration::from_secs(120);
/// For the memory of converted pages to be freed, longer than any delay that a scenario asks for.
const RELEASE_PATIENCE: Duration = Duration::from_secs(120);

/// For a block in which more pages of alternating kinds are to be than the library allows by default. It has a bound only where
/// conversion is in place.
pub fn many_runs() -> &'static str {
    match kernel::in_place() {
        true => ",max-runs=2147483647",
        false => "",
    }
}

/// What an SNP or TDX guest has beyond what every confidential one has.
pub struct Tee {
    pub kind: tee::Kind,
    /// RAM is ours, and not QEMU's own memory-backend-memfd.
    ours: bool,
    /// Memory of QEMU's own that holds no RAM: firmware and ROMs. All of it begins private.
    pub others: Vec<Range<u64>>,
    /// What of that has been shared since.
    pub others_shared: Vec<Range<u64>>,
}

impl Tee {
    /// What guest_memfds of QEMU's own hold at most.
    fn others_bytes(&self) -> u64 {
        self.others
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }
}

/// A confidential guest under way.
pub struct Confidential {
    pub machine: Machine,
    pub monitor: Monitor,
    pub ledger: Ledger,
    /// The shared bytes of each block, as the host sees them.
    pub shared: Vec<SharedFile>,
    /// Private and shared bytes are in one file, and what is in a page after its conversion nobody knows.
    pub in_place: bool,
    /// Devices may be kept from pages that are shared, after a failure.
    pub quarantine: bool,
    /// Whether an agreement waits until all memory that converted pages had is freed, and so the next conversion finds none.
    pub patient: bool,
    /// So many blocks, the first ones, have all of their memory.
    preallocated: usize,
    release: Release,
    /// Descriptors that QEMU was started with.
    given: Vec<RawFd>,
    pages_before: u64,
    /// Of an SNP or TDX guest.
    pub tee: Option<Tee>,
    /// Words, pages and numbers that were compared so far.
    pub compared_bytes: u64,
    pub agreements: u64,
}

impl Confidential {
    /// A guest with one block, all of it below 4 GiB.
    pub fn with_one_block(
        directory: &Path,
        bytes: u64,
        properties: &str,
        more: &[&str],
    ) -> Result<Self, Failure> {
        let surroundings = Surroundings::default();
        Self::with_one_block_in(directory, bytes, properties, more, surroundings)
    }

    /// As `with_one_block`, in surroundings of the caller's choice.
    pub fn with_one_block_in(
        directory: &Path,
        bytes: u64,
        properties: &str,
        more: &[&str],
        surroundings: Surroundings,
    ) -> Result<Self, Failure> {
        let object = format!("memory-backend-gmem,id=ram0,size={bytes}{properties}");
        let size = format!("{}M", bytes >> 20);
        let mut arguments = vec!["-object", &object, "-m", &size, "-machine"];
        arguments.push("q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0");
        arguments.extend(more);
        let block = Block::small("ram0", bytes);
        let ledger = Ledger::new(vec![block]);
        Self::start_in(directory, &arguments, ledger, surroundings)
    }

    /// A guest with one block and one edu device, passed through.
    pub fn with_one_device(
        directory: &Path,
        bytes: u64,
        surroundings: Surroundings,
    ) -> Result<Self, Failure> {
        let passthrough = format!("vfio-pci,host={},iommufd=iommufd0", to_vfio(&EDU)?);
        let device = ["-object", "iommufd,id=iommufd0", "-device", &passthrough];
        Self::with_one_block_in(directory, bytes, "", &device, surroundings)
    }

    /// A guest with these arguments, whose memory is what the ledger says, all of it shared.
    pub fn start(directory: &Path, arguments: &[&str], ledger: Ledger) -> Result<Self, Failure> {
        Self::start_in(directory, arguments, ledger, Surroundings::default())
    }

    /// As `start`, in surroundings of the caller's choice.
    pub fn start_in(
        directory: &Path,
        arguments: &[&str],
        ledger: Ledger,
        surroundings: Surroundings,
    ) -> Result<Self, Failure> {
        let mut all = vec![
            "-object",
            "sw-protected-guest,id=cgs0",
            "-kernel",
            place::payload(),
        ];
        all.extend(arguments);
        Self::begin(directory, &all, ledger, surroundings, None)
    }

    /// An SNP or TDX guest: see [`tee::Launch`], which has the arguments.
    pub fn launch_in(
        directory: &Path,
        kind: tee::Kind,
        ours: bool,
        arguments: &[&str],
        ledger: Ledger,
        surroundings: Surroundings,
    ) -> Result<Self, Failure> {
        let tee = Tee {
            kind,
            ours,
            others: kind.others()?,
            others_shared: Vec::new(),
        };
        Self::begin(directory, arguments, ledger, surroundings, Some(tee))
    }

    fn begin(
        directory: &Path,
        arguments: &[&str],
        ledger: Ledger,
        surroundings: Surroundings,
        tee: Option<Tee>,
    ) -> Result<Self, Failure> {
        let pages_before = pages::outside_shmem()?;
        let (machine, serial) = Machine::start_in(directory, arguments, surroundings)?;
        let (monitor, shared) = Self::connect(&machine, serial, &ledger)?;
        // A policy is kept to by allocating a file in place before anybody else does.
        let all_there = arguments
            .iter()
            .any(|word| word.contains("prealloc=on") || word.contains("host-nodes="));
        let preallocated = if all_there { ledger.blocks.len() } else { 0 };
        Ok(Self {
            machine,
            monitor,
            ledger,
            shared,
            in_place: kernel::in_place(),
            quarantine: false,
            patient: false,
            release: Release::of(arguments),
            given: surroundings.inherited.to_vec(),
            preallocated,
            pages_before,
            tee,
            compared_bytes: 0,
            agreements: 0,
        })
    }

    fn connect(
        machine: &Machine,
        serial: Lines,
        ledger: &Ledger,
    ) -> Result<(Monitor, Vec<SharedFile>), Failure> {
        let monitor = Monitor::new(serial)?;
        Ok((monitor, Self::open_shared(machine, ledger)?))
    }

    fn open_shared(machine: &Machine, ledger: &Ledger) -> Result<Vec<SharedFile>, Failure> {
        let blocks = ledger.blocks.iter();
        blocks
            .map(|block| SharedFile::open(machine.pid(), block.bytes))
            .collect()
    }

    /// Looks for the shared bytes anew: a VM that was rebuilt has other files.
    pub fn reopen(&mut self) -> Outcome {
        self.shared = Self::open_shared(&self.machine, &self.ledger)?;
        Ok(())
    }

    /// Whether RAM is of a memory-backend-gmem.
    pub fn is_ours(&self) -> bool {
        self.tee.as_ref().is_none_or(|tee| tee.ours)
    }

    /// A conversion that is to succeed.
    pub fn convert(&mut self, scenario: &Scenario, gpa: u64, bytes: u64, private: bool) -> Outcome {
        let result = self.monitor.convert(gpa, bytes, private)?;
        let direction = if private { "private" } else { "shared" };
        scenario.check_equal(
            result,
            0,
            format!("the hypercall turns {bytes:#x} bytes at {gpa:#x} {direction}"),
        )?;
        self.ledger.convert(gpa, bytes, private);
        Ok(())
    }

    /// The guest writes a pattern.
    pub fn fill(&mut self, gpa: u64, bytes: u64, seed: u64) -> Outcome {
        self.monitor.fill(gpa, bytes, seed)?;
        self.ledger.fill(gpa, bytes, seed);
        Ok(())
    }

    /// The guest reads zeros all over a range.
    pub fn expect_zeros(&mut self, scenario: &Scenario, gpa: u64, bytes: u64) -> Outcome {
        let difference = self.monitor.zeros(gpa, bytes)?;
        self.compared_bytes += bytes;
        scenario.check_equal(
            difference,
            None,
            format!("the guest reads zeros from {bytes:#x} bytes at {gpa:#x}"),
        )
    }

    /// Whether pages that have just been converted hold zeros. Not where nobody promises that, nor where they may have the memory
    /// still that they had when they were last of that kind.
    fn is_fresh(&self) -> bool {
        !self.in_place && (self.patient || self.release == Release::AtOnce)
    }

    /// A range has just been converted: the guest reads zeros all over it, where the kernel promises that.
    pub fn expect_fresh(&mut self, scenario: &Scenario, gpa: u64, bytes: u64) -> Outcome {
        match self.is_fresh() {
            true => self.expect_zeros(scenario, gpa, bytes),
            false => Ok(()),
        }
    }

    /// As `expect_fresh`, for single pages at equal distances.
    pub fn expect_fresh_pages(
        &mut self,
        scenario: &Scenario,
        gpa: u64,
        count: u64,
        stride: u64,
    ) -> Outcome {
        if !self.is_fresh() {
            return Ok(());
        }
        let difference = self.monitor.zero_pages(gpa, count, stride)?;
        scenario.check_equal(
            difference,
            None,
            format!("the guest reads zeros from {count} single pages from {gpa:#x} on"),
        )
    }

    /// Bytes that should be in guest_memfds: the private ones; or, where all are in one file, what was ever touched, which
    /// only the page cache knows, or all of it. Huge pages are counted elsewhere as long as they are whole.
    pub fn guest_memfd_bytes(&self) -> Result<u64, Failure> {
        if !self.in_place {
            return Ok(self.ledger.all_private_bytes());
        }
        let blocks = self.ledger.blocks.iter().zip(&self.shared);
        blocks
            .enumerate()
            .map(|(index, (block, file))| match block.page_bytes {
                PAGE if index < self.preallocated => Ok(block.bytes),
                PAGE => file.allocated(),
                // Those that are in pieces: a page of theirs became shared.
                page_bytes if self.tee.is_some() => Ok(self.ledger.live_pages(index) * page_bytes),
                // Where all starts shared, which of them are there nobody knows.
                _ => Ok(0),
            })
            .sum()
    }

    /// Bytes in guest_memfds now, by the kernel's counters.
    pub fn private_allocated(&self) -> Result<u64, Failure> {
        Ok(pages::outside_shmem()?.saturating_sub(self.pages_before))
    }

    /// What pages had before they were converted and what is not freed yet, says QEMU.
    fn double_bytes(&mut self) -> Result<u64, Failure> {
        Gmem::query(&mut self.machine.qmp)?.sum("double-bytes")
    }

    /// Waits until each page has memory in one file only: as long as nothing is converted, the rest is freed after a delay.
    pub fn settle(&mut self) -> Outcome {
        let deadline = Instant::now() + RELEASE_PATIENCE;
        loop {
            let double = self.double_bytes()?;
            if double == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Failure::new(format!(
                    "does not hold: what converted pages had is freed in the end: {double} bytes are not"
                )));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Guest, QEMU and kernel all say what the ledger says. Every private page must have been touched before.
    pub fn agree(&mut self, scenario: &Scenario, step: &str) -> Outcome {
        self.guest_agrees(scenario, step)?;
        self.qemu_agrees(scenario, step)?;
        self.kernel_agrees(scenario, step)?;
        files::are_kept(scenario, self.machine.pid(), &self.given, step)?;
        self.agreements += 1;
        scenario.progress(format!(
            "{step}: {} KiB private, guest, QEMU and kernel agree",
            self.ledger.all_private_bytes() >> 10
        ));
        Ok(())
    }

    /// As `agree`, without the kernel: also where private pages were not touched yet.
    pub fn agree_but_kernel(&mut self, scenario: &Scenario, step: &str) -> Outcome {
        self.guest_agrees(scenario, step)?;
        self.qemu_agrees(scenario, step)?;
        self.host_sees_shared(scenario, step)
    }

    fn guest_agrees(&mut self, scenario: &Scenario, step: &str) -> Outcome {
        for (gpa, bytes, seed) in self.ledger.contents() {
            let difference = self.monitor.check(gpa, bytes, seed)?;
            self.compared_bytes += bytes;
            scenario.check_equal(
                difference,
                None,
                format!("{step}: the guest finds what it wrote to {bytes:#x} bytes at {gpa:#x}"),
            )?;
        }
        Ok(())
    }

    fn qemu_agrees(&mut self, scenario: &Scenario, step: &str) -> Outcome {
        if !self.is_ours() {
            return Ok(());
        }
        let gmem = Gmem::query(&mut self.machine.qmp)?;
        for (index, block) in self.ledger.blocks.iter().enumerate() {
            let said = gmem.block(block.id)?;
            let private = self.ledger.private_bytes(index);
            for (name, expected) in [
                ("size", block.bytes),
                ("private", private),
                ("shared", block.bytes - private),
                ("private-runs", self.ledger.private_runs(index).len() as u64),
                ("quarantined", 0),
            ] {
                if name == "quarantined" && self.quarantine {
                    continue;
                }
                scenario.check_equal(
                    said.number(name)?,
                    expected,
                    format!("{step}: query-gmem's {name} of {}", block.id),
                )?;
            }
        }
        Ok(())
    }

    /// What both files hold beyond the books. Private pages that were not touched yet have no memory, and hide as much.
    fn held_twice(&self) -> Result<u64, Failure> {
        let private = self.private_allocated()?;
        let others = self.tee.as_ref().map_or(0, Tee::others_bytes);
        let mut bytes = private.saturating_sub(self.guest_memfd_bytes()? + others);
        for (index, block) in self.ledger.blocks.iter().enumerate() {
            let file = &self.shared[index];
            if block.page_bytes != PAGE {
                let most = self.ledger.live_pages(index) * block.page_bytes;
                bytes += file.allocated()?.saturating_sub(most);
                continue;
            }
            let extents = file.extents()?;
            let behind = self.ledger.private_runs(index);
            bytes += behind.iter().map(|run| overlap(&extents, run)).sum::<u64>();
        }
        Ok(bytes)
    }

    /// What both files hold beyond the books is no more than QEMU says that it has still to free; that.
    fn double_memory_is_known(&mut self, scenario: &Scenario, step: &str) -> Result<u64, Failure> {
        // In this order: nothing converts, so it can only become less meanwhile.
        let known = self.double_bytes()?;
        scenario.check(
            known == 0 || self.release != Release::AtOnce,
            format!("{step}: where pages are freed at once, {known} bytes are not"),
        )?;
        let held = self.held_twice()?;
        scenario.check(
            held <= known,
            format!("{step}: pages have {held} bytes of memory twice, of which QEMU knows {known}"),
        )?;
        Ok(known)
    }

    fn kernel_agrees(&mut self, scenario: &Scenario, step: &str) -> Outcome {
        if let Some(tee) = &self.tee {
            self.kvm_agrees(scenario, step, tee)?;
            if !tee.ours {
                return self.host_sees_shared(scenario, step);
            }
        }
        if !self.in_place {
            if self.patient {
                self.settle()?;
            }
            if self.double_memory_is_known(scenario, step)? != 0 {
                return self.host_sees_shared(scenario, step);
            }
        }
        if pages::can_tell() {
            self.guest_memfds_agree(scenario, step)?;
        }
        if self.in_place {
            self.one_file_agrees(scenario, step)?;
            return self.host_sees_shared(scenario, step);
        }
        let secrets: HashSet<u64> = self.ledger.secrets().collect();
        for (index, block) in self.ledger.blocks.iter().enumerate() {
            if self.ledger.blocks[index].page_bytes != PAGE {
                self.huge_pages_agree(scenario, step, index, &secrets)?;
                continue;
            }
            let extents = self.shared[index].extents()?;
            for run in self.ledger.private_runs(index) {
                scenario.check_equal(
                    overlap(&extents, &run),
                    0,
                    format!(
                        "{step}: memfd bytes of {} behind private {run:#x?}",
                        block.id
                    ),
                )?;
            }
            for extent in &extents {
                let leak = find_secret(&self.shared[index], extent, &secrets)?;
                scenario.check_equal(
                    leak,
                    None,
                    format!(
                        "{step}: offset in the memfd of {} with private bytes",
                        block.id
                    ),
                )?;
            }
        }
        self.host_sees_shared(scenario, step)
    }

    fn guest_memfds_agree(&self, scenario: &Scenario, step: &str) -> Outcome {
        let (held, known) = (self.private_allocated()?, self.guest_memfd_bytes()?);
        let rule = format!("{step}: bytes in guest_memfds by /proc/vmstat");
        let Some(tee) = &self.tee else {
            return scenario.check_equal(held, known, rule);
        };
        // Firmware and ROMs are in some, too. And most of what starts private has not been touched where both kinds are apart.
        let most = known + tee.others_bytes();
        let least = if self.in_place { known } else { 0 };
        scenario.check(
            (least..=most).contains(&held),
            format!("{rule} are {held}, which is not from {least} to {most}"),
        )
    }

    /// KVM thinks of each page what the ledger says. Beyond RAM there are firmware and ROMs.
    fn kvm_agrees(&self, scenario: &Scenario, step: &str, tee: &Tee) -> Outcome {
        let view = View::of(self.machine.pid())?;
        scenario.check_equal(
            (view.kind.as_str(), view.state.as_str()),
            (tee.kind.name(), "finished"),
            format!("{step}: what KVM runs, and how far its launch is"),
        )?;
        let within = |ranges: &[Range<u64>], gpa| ranges.iter().any(|range| range.contains(&gpa));
        let expected = |page| match self.ledger.place(page) {
            _ if within(&tee.others, page) => !within(&tee.others_shared, page),
            Some(_) => self.ledger.is_private(page),
            None => false,
        };
        let mut pages_of_ram = 0;
        for run in &view.runs {
            let differs = tee::pages(&run.addresses).find(|page| expected(*page) != run.private);
            scenario.check_equal(
                differs,
                None,
                format!(
                    "{step}: a page that KVM takes for private ({}), and the ledger not",
                    run.private
                ),
            )?;
            let of_ram =
                tee::pages(&run.addresses).filter(|page| self.ledger.place(*page).is_some());
            pages_of_ram += of_ram.count();
        }
        let all: Vec<u64> = self.ledger.places().iter().flat_map(tee::pages).collect();
        let hidden = all.iter().filter(|page| tee::is_hidden(**page)).count();
        scenario.check(
            (all.len() - hidden..=all.len()).contains(&pages_of_ram),
            format!(
                "{step}: KVM has {pages_of_ram} pages of RAM, which are {}",
                all.len()
            ),
        )
    }

    /// Private bytes are where the shared ones are: the host is kept from them, and there is no second memory.
    fn one_file_agrees(&self, scenario: &Scenario, step: &str) -> Outcome {
        scenario.check_equal(
            memfds_of_ram(self.machine.pid())?,
            Vec::new(),
            format!("{step}: memfds beside the guest_memfds"),
        )?;
        let secrets: HashSet<u64> = self.ledger.secrets().collect();
        for (index, block) in self.ledger.blocks.iter().enumerate() {
            let file = &self.shared[index];
            let runs = self.ledger.private_runs(index);
            for run in sample(&runs) {
                for offset in [run.start, run.end - PAGE] {
                    let refusal = file.try_read(&mut [0], offset);
                    scenario.check_equal(
                        refusal.err().and_then(|error| error.raw_os_error()),
                        Some(libc::EIO),
                        format!(
                            "{step}: what the host gets for reading the private page at {offset:#x} of {}",
                            block.id
                        ),
                    )?;
                }
            }
            for extent in without(&file.extents()?, &runs) {
                let leak = find_secret(file, &extent, &secrets)?;
                scenario.check_equal(
                    leak,
                    None,
                    format!("{step}: shared offset of {} with private bytes", block.id),
                )?;
            }
        }
        Ok(())
    }

    /// A block in huge pages: the file says how much it holds, but not where.
    fn huge_pages_agree(
        &self,
        scenario: &Scenario,
        step: &str,
        index: usize,
        secrets: &HashSet<u64>,
    ) -> Outcome {
        let block = &self.ledger.blocks[index];
        let held = self.shared[index].allocated()?;
        let most = self.ledger.live_pages(index) * block.page_bytes;
        scenario.check(
            held <= most,
            format!(
                "{step}: the memfd of {} holds {held:#x} bytes, at most {most:#x} are in pages with shared bytes",
                block.id
            ),
        )?;
        let leak = find_secret(&self.shared[index], &(0..block.bytes), secrets)?;
        scenario.check_equal(
            leak,
            None,
            format!(
                "{step}: offset in the memfd of {} with private bytes",
                block.id
            ),
        )
    }

    /// The host sees every shared page with known contents, byte for byte.
    fn host_sees_shared(&mut self, scenario: &Scenario, step: &str) -> Outcome {
        let mut seen = [0; PAGE as usize];
        for (gpa, bytes, seed) in self.ledger.contents() {
            for page in (gpa..gpa + bytes).step_by(PAGE as usize) {
                let Some((block, offset)) = self.ledger.place(page) else {
                    continue;
                };
                if self.ledger.is_private(page) {
                    continue;
                }
                self.shared[block].read_into(&mut seen, offset)?;
                let same = seen
                    .chunks_exact(8)
                    .zip((page..).step_by(8))
                    .all(|(word, at)| word == pattern(seed, at).to_le_bytes());
                scenario.check(
                    same,
                    format!("{step}: the host sees the bytes of the shared page {page:#x}"),
                )?;
                self.compared_bytes += PAGE;
            }
        }
        Ok(())
    }

    /// No guest_memfd can be read through its descriptor; how the kernel refuses, for a fact.
    pub fn host_is_refused(&self, scenario: &Scenario) -> Result<String, Failure> {
        let files = guest_memfds(self.machine.pid())?;
        scenario.check(!files.is_empty(), "QEMU holds a guest_memfd")?;
        let mut refusal = String::new();
        for path in files {
            match readable(&path) {
                Ok(()) => scenario.check(false, format!("{} can't be read", path.display()))?,
                Err(error) => refusal = error.to_string(),
            }
        }
        Ok(refusal)
    }

    /// The guest powers off; QEMU ends with success; the kernel has all memory of the guest_memfds back.
    /// Before that, no page has memory twice any more.
    pub fn finish(mut self, scenario: &Scenario) -> Outcome {
        if !self.in_place && self.is_ours() && self.release != Release::Late {
            self.settle()?;
            self.double_memory_is_known(scenario, "before the end")?;
        }
        self.monitor.power_off()?;
        self.machine.wait_for_exit(EXIT_PATIENCE)?;
        scenario.check_equal(
            self.private_allocated()?,
            0,
            "bytes that guest_memfds still hold after QEMU's end",
        )
    }
}

/// Some of them, from all over.
fn sample(runs: &[Range<u64>]) -> impl Iterator<Item = &Range<u64>> {
    const ENOUGH: usize = 64;
    runs.iter().step_by(runs.len().div_ceil(ENOUGH).max(1))
}

/// What of the extents is in none of the runs. Both are in order.
fn without(extents: &[Range<u64>], runs: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    for extent in extents {
        let mut at = extent.start;
        for run in runs {
            if run.end <= at || run.start >= extent.end {
                continue;
            }
            if run.start > at {
                left.push(at..run.start);
            }
            at = run.end;
        }
        if at < extent.end {
            left.push(at..extent.end);
        }
    }
    left
}

/// The first page of the extent that begins with one of the words.
pub fn find_secret(
    file: &SharedFile,
    extent: &Range<u64>,
    secrets: &HashSet<u64>,
) -> Result<Option<u64>, Failure> {
    const CHUNK: u64 = 4 << 20;
    let mut at = extent.start;
    while at < extent.end {
        let bytes = CHUNK.min(extent.end - at);
        let mut seen = vec![0; bytes as usize];
        file.read_into(&mut seen, at)?;
        let found = seen.chunks(PAGE as usize).position(|page| {
            page.first_chunk()
                .is_some_and(|word| secrets.contains(&u64::from_le_bytes(*word)))
        });
        if let Some(page) = found {
            return Ok(Some(at + page as u64 * PAGE));
        }
        at += bytes;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::{sample, without};

    #[test]
    fn runs_are_taken_out_of_extents() {
        let left = without(&[0..10, 20..30], &[2..4, 8..22, 29..40]);
        assert_eq!(left, [0..2, 4..8, 22..29]);
        assert_eq!(without(&[0..10, 20..30], &[]), [0..10, 20..30]);
        assert!(without(&[3..5, 6..7], &[0..6, 6..10]).is_empty());
    }

    #[test]
    fn a_sample_has_all_of_few() {
        let runs: Vec<_> = (0..1000).map(|at| at..at + 1).collect();
        assert_eq!(sample(&runs[..3]).count(), 3);
        assert!((32..=64).contains(&sample(&runs).count()));
        assert_eq!(sample(&[]).count(), 0);
    }
}
