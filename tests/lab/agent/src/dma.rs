// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a passed-through DMA engine reaches: asked by letting it carry a page, and of the IOMMU by the faults it reports.

use crate::confidential::Confidential;
use crate::failure::Failure;
use crate::host::memory::overlap;
use crate::host::messages::Messages;
use crate::ledger::PAGE;
use crate::scenario::{Outcome, Scenario};
use std::time::Duration;

/// The kernel prints at most 10 faults in 5 s: after that long a fault that was not printed is brought about again.
const FAULT_PATIENCE: Duration = Duration::from_secs(6);
const FAULT_ATTEMPTS: usize = 4;
const SEED: u64 = 1001;
const PRIVATE_SEED: u64 = 1002;

/// One of the guest's edu devices: `index` others come before it.
#[derive(Clone, Copy)]
pub struct Engine {
    pub index: u64,
    /// A page that stays shared, from which it carries.
    pub origin: u64,
}

impl Engine {
    pub fn new(index: u64, origin: u64) -> Self {
        Self { index, origin }
    }

    /// The device carries a page to `target`, which is shared: it arrives, and the host sees it. Afterwards the guest
    /// writes something known there.
    pub fn reaches(&self, scenario: &Scenario, guest: &mut Confidential, target: u64) -> Outcome {
        guest.fill(self.origin, PAGE, SEED)?;
        guest.monitor.zero(target, PAGE)?;
        guest.monitor.edu_load_by(self.index, self.origin)?;
        guest.monitor.edu_store_by(self.index, target)?;
        let difference = guest.monitor.check_copy(target, PAGE, SEED, self.origin)?;
        scenario.check_equal(
            difference,
            None,
            format!(
                "DMA by device {} arrives in the shared page {target:#x}",
                self.index
            ),
        )?;
        guest.fill(target, PAGE, SEED + 10)
    }

    /// The device neither writes nor reads `target`, which is private, and the IOMMU says so; what it says.
    pub fn is_kept_from(
        &self,
        scenario: &Scenario,
        guest: &mut Confidential,
        target: u64,
        elsewhere: u64,
    ) -> Result<String, Failure> {
        let mut messages = Messages::from_now()?;
        self.misses(scenario, guest, target, elsewhere)?;
        let address = format!("{target:#x}");
        for attempt in 0..FAULT_ATTEMPTS {
            if attempt > 0 {
                guest.monitor.edu_store_by(self.index, target)?;
            }
            if let Some(fault) = messages.find(&["DMAR", &address], FAULT_PATIENCE)? {
                return Ok(fault);
            }
        }
        Err(Failure::new(format!(
            "does not hold: the IOMMU reports a fault at {address}"
        )))
    }

    /// The device neither writes nor reads `target`, which is private.
    pub fn misses(
        &self,
        scenario: &Scenario,
        guest: &mut Confidential,
        target: u64,
        elsewhere: u64,
    ) -> Outcome {
        guest.fill(target, PAGE, PRIVATE_SEED)?;
        guest.fill(self.origin, PAGE, SEED)?;
        // Where there is one file the page is in it, and what the guest finds there says all.
        let split = !guest.in_place;
        let place = guest.ledger.place(target).filter(|_| split);
        let before = place.map(|place| behind(guest, place)).transpose()?;
        guest.monitor.edu_load_by(self.index, self.origin)?;
        guest.monitor.edu_store_by(self.index, target)?;
        let changed = guest.monitor.check(target, PAGE, PRIVATE_SEED)?;
        scenario.check_equal(
            changed,
            None,
            format!(
                "DMA by device {} leaves the private page {target:#x} untouched",
                self.index
            ),
        )?;
        if let (Some(place), Some((held, bytes))) = (place, before) {
            let (held_now, bytes_now) = behind(guest, place)?;
            // It may just have been freed.
            scenario.check(
                held_now <= held && (bytes_now == bytes || bytes_now.iter().all(|byte| *byte == 0)),
                format!("DMA lands nowhere behind the private page: {held} bytes there before, {held_now} after"),
            )?;
        }
        guest.monitor.edu_load_by(self.index, target)?;
        guest.monitor.edu_store_by(self.index, elsewhere)?;
        let stolen = guest
            .monitor
            .check_copy(elsewhere, PAGE, PRIVATE_SEED, target)?;
        scenario.check(stolen.is_some(), "the device can't read the private page")?;
        guest.fill(elsewhere, PAGE, SEED + 11)
    }
}

/// How much a block's file of shared bytes has behind a private page, and what: nothing, or what is still to be freed.
fn behind(guest: &Confidential, (block, offset): (usize, u64)) -> Result<(u64, Vec<u8>), Failure> {
    let file = &guest.shared[block];
    let mut bytes = vec![0; PAGE as usize];
    file.read_into(&mut bytes, offset)?;
    let held = match guest.ledger.blocks[block].page_bytes {
        PAGE => overlap(&file.extents()?, &(offset..offset + PAGE)),
        // Where a file in huge pages has none it does not say.
        _ => file.allocated()?,
    };
    Ok((held, bytes))
}

/// All results must be "done".
pub fn all_done(scenario: &Scenario, results: &[(i64, u64)], what: &str) -> Result<u64, Failure> {
    scenario.check(
        results.iter().all(|(value, _)| *value == 0),
        format!("{what}: each conversion succeeds: {results:?}"),
    )?;
    Ok(results.iter().map(|(_, times)| times).sum())
}
