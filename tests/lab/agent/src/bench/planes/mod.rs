// SPDX-License-Identifier: MIT OR Apache-2.0
//! The same guest on memory of each kind: two files, one whose pages convert in place, one of huge pages.
//!
//! A boot of L1 has either the first kind or the others, and times of two boots don't compare. So each boot also takes
//! yardsticks that no kind of memory changes, and the host's half gives times as multiples of one of them. What these
//! scenarios found is in the facts `readings`, `yardsticks` and `missing`.

mod access;
mod convert;
mod footprint;
mod library;
mod readings;
mod yardstick;

pub use access::run as access;
pub use convert::run as convert;
pub use footprint::run as footprint;
pub use library::run as library;

use super::guest::{Guest, Plan, Side};
use super::kernel::{new_vm, Memory};
use crate::failure::{Attempt, Failure};
use crate::host::huge_pages::Pool;
use crate::host::kernel;
use crate::scenario::Scenario;
use gmem::Vm;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const HUGE: u64 = 2 * MIB;

/// A kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    Split,
    /// Shared memory of 2 MiB pages from the pool, private memory as in `Split`.
    SplitHuge,
    InPlace,
    InPlaceHuge,
}

impl Column {
    fn name(self) -> &'static str {
        match self {
            Column::Split => "split",
            Column::SplitHuge => "split-2m",
            Column::InPlace => "in-place",
            Column::InPlaceHuge => "in-place-2m",
        }
    }

    fn is_huge(self) -> bool {
        matches!(self, Column::SplitHuge | Column::InPlaceHuge)
    }

    /// For QEMU.
    fn properties(self) -> &'static str {
        match self.is_huge() {
            true => ",hugetlb=on,hugetlbsize=2M",
            false => "",
        }
    }

    fn memory(self) -> Memory {
        match self {
            Column::Split | Column::SplitHuge => Memory::Split,
            Column::InPlace => Memory::InPlace,
            Column::InPlaceHuge => Memory::InPlaceHuge,
        }
    }
}

/// What a kernel of this mode could have and lacks, with the reason.
type Missing = Vec<(Column, String)>;

/// The kinds of `wanted` that this boot of L1 has, and what it lacks.
fn columns(wanted: &[Column]) -> Result<(Vec<Column>, Missing), Failure> {
    let in_place = kernel::in_place();
    let of_mode =
        |column: &Column| matches!(column, Column::InPlace | Column::InPlaceHuge) == in_place;
    let probe = {
        let vm = new_vm()?;
        let vm = Vm::new(&vm).attempt(|| "giving the library a VM".into())?;
        vm.probe()
    };
    let mut here = Vec::new();
    let mut missing = Vec::new();
    for column in wanted.iter().copied().filter(of_mode) {
        if column == Column::InPlaceHuge && probe.huge_page_sizes & HUGE == 0 {
            let why = "this kernel makes no guest_memfd of huge pages";
            missing.push((column, why.to_string()));
        } else {
            here.push(column);
        }
    }
    Ok((here, missing))
}

/// The pool for so many bytes in all, if any of the kinds needs it; without one these go. Must outlive the guests.
fn pool(columns: &mut Vec<Column>, bytes: u64, missing: &mut Missing) -> Option<Pool> {
    /// Beside the guests' own.
    const SPARE: u64 = 8;
    if !columns.iter().any(|column| column.is_huge()) {
        return None;
    }
    let pool = Pool::of(HUGE).and_then(|pool| {
        pool.resize(bytes / HUGE + SPARE)?;
        Ok(pool)
    });
    match pool {
        Ok(pool) => Some(pool),
        Err(failure) => {
            give_up_huge(columns, missing, &failure);
            None
        }
    }
}

fn give_up_huge(columns: &mut Vec<Column>, missing: &mut Missing, why: &Failure) {
    let lost = columns.iter().filter(|column| column.is_huge());
    missing.extend(lost.map(|column| (*column, why.to_string())));
    columns.retain(|column| !column.is_huge());
}

/// A guest of each kind; one of huge pages that does not come up is missing.
fn start_all(
    scenario: &Scenario,
    columns: &[Column],
    ram_bytes: u64,
    devices: &[String],
    missing: &mut Missing,
) -> Result<Vec<(Column, Guest)>, Failure> {
    let mut guests = Vec::new();
    for (index, column) in columns.iter().enumerate() {
        let device = devices
            .get(index)
            .attempt(|| "L1 has too few edu devices".to_string())?;
        match start(scenario, *column, ram_bytes, device) {
            Ok(guest) => guests.push((*column, guest)),
            Err(failure) if column.is_huge() => missing.push((*column, failure.to_string())),
            Err(failure) => return Err(failure),
        }
    }
    Ok(guests)
}

/// A guest on memory of one kind, all of it private but the payload's own.
fn start(
    scenario: &Scenario,
    column: Column,
    ram_bytes: u64,
    device: &str,
) -> Result<Guest, Failure> {
    let plan = Plan {
        side: Side::Gmem("cut"),
        ram_bytes,
        processors: 1,
        label: column.name(),
        properties: column.properties(),
        more: &[],
    };
    let mut guest = Guest::start(scenario, plan, device)?;
    guest.all_private()?;
    let gmem = guest.gmem()?.attempt(|| "it is our side".to_string())?;
    let backing = gmem.block("ram0")?.text("backing")?.to_string();
    let expected = match kernel::in_place() {
        true => "in-place",
        false => "split",
    };
    scenario.check_equal(backing.as_str(), expected, "the backing of ram0")?;
    scenario.progress(format!("{} is up", column.name()));
    Ok(guest)
}

/// The guest writes to each page; nanoseconds by its clock.
fn touch(guest: &mut Guest, address: u64, bytes: u64) -> Result<f64, Failure> {
    timed(guest, &format!("bench-touch {address:#x} {bytes:#x}"))
}

/// The nanoseconds in the answer to a verb that makes no requests.
fn timed(guest: &mut Guest, verb: &str) -> Result<f64, Failure> {
    let words = guest.monitor.ask(verb)?;
    words
        .get(1)
        .and_then(|word| word.parse().ok())
        .attempt(|| format!("the answer to `{verb}` has no time: {words:?}"))
}
