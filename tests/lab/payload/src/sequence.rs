// SPDX-License-Identifier: MIT OR Apache-2.0
//! The requests of a benchmark's cases. The guest makes them, and L1's bare replay makes the same kernel calls for them,
//! so both take them from here. Needs nothing but `core`.

/// One conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Guest physical address.
    pub address: u64,
    /// 4 KiB pages.
    pub pages: u64,
    /// To private; else to shared.
    pub private: bool,
}

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const LARGE: u64 = 2 * MIB;

/// `count` requests side by side.
pub fn linear(
    address: u64,
    count: u64,
    pages: u64,
    private: bool,
) -> impl Iterator<Item = Request> + Clone {
    (0..count).map(move |index| Request {
        address: address + index * pages * PAGE,
        pages,
        private,
    })
}

/// Where page number `index` of a working set lies, in pages: spread over `region_pages` (a power of two), no page twice.
fn scattered(index: u64, region_pages: u64) -> u64 {
    (index.wrapping_mul(0x9e37_79b1).wrapping_add(12_345)) & (region_pages - 1)
}

/// The working set of `set` pages in `region_pages` places that are `spread` pages apart; the last page of each place.
#[derive(Clone, Copy)]
pub struct WorkingSet {
    /// Where it begins.
    pub address: u64,
    /// How many places there are; a power of two.
    pub region_pages: u64,
    /// How many of them are used.
    pub set: u64,
    /// Distance of places, in pages.
    pub spread: u64,
}

impl WorkingSet {
    /// The address of its page number `index`.
    pub fn page(&self, index: u64) -> u64 {
        let place = scattered(index, self.region_pages);
        self.address + ((place + 1) * self.spread - 1) * PAGE
    }

    /// Each page once, in one direction.
    pub fn once(self, private: bool) -> impl Iterator<Item = Request> + Clone {
        (0..self.set).map(move |index| Request {
            address: self.page(index),
            pages: 1,
            private,
        })
    }

    /// `count` pages, each to private and back. With seed 0 the set in order, else at random.
    pub fn churn(self, count: u64, seed: u64) -> impl Iterator<Item = Request> + Clone {
        self.turns(count, seed, true)
    }

    /// As `churn`, to `first` and back; with false the set is private around them.
    pub fn turns(
        self,
        count: u64,
        seed: u64,
        first: bool,
    ) -> impl Iterator<Item = Request> + Clone {
        let mut random = Random(seed);
        (0..count).flat_map(move |turn| {
            let index = match seed {
                0 => turn % self.set,
                _ => random.next() % self.set,
            };
            let address = self.page(index);
            [first, !first].map(|private| Request {
                address,
                pages: 1,
                private,
            })
        })
    }
}

/// Marsaglia's xorshift: any seed but 0.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// How a kind of guest cuts a large request into exits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// KVM hands on 2 MiB at a time (TDX_MAP_GPA_MAX_LEN).
    Tdx,
    /// Page-state-change entries of 2 MiB where they fit, 64 to a batch; KVM joins neighbours of one size in a batch.
    Snp,
}

/// What a Linux guest's swiotlb takes: 6 % of RAM, 64 MiB to 1 GiB (mem_encrypt_setup_arch), in 256 KiB segments.
pub fn swiotlb_bytes(ram_bytes: u64) -> u64 {
    (ram_bytes / 100 * 6)
        .clamp(64 * MIB, 1024 * MIB)
        .next_multiple_of(256 << 10)
}

/// Exits for one call of set_memory_decrypted over [address, address + bytes), which begins on 2 MiB.
fn decrypted(flavour: Flavour, address: u64, bytes: u64) -> impl Iterator<Item = Request> + Clone {
    const BATCH: u64 = 64;
    let mut done = 0;
    let mut room = BATCH;
    core::iter::from_fn(move || {
        let left = bytes - done;
        if left == 0 {
            return None;
        }
        let length = match flavour {
            Flavour::Tdx => left.min(LARGE),
            Flavour::Snp => {
                let unit = if left >= LARGE { LARGE } else { PAGE };
                let entries = (left / unit).min(room);
                room -= entries;
                if room == 0 {
                    room = BATCH;
                }
                entries * unit
            }
        };
        let request = Request {
            address: address + done,
            pages: length / PAGE,
            private: false,
        };
        done += length;
        Some(request)
    })
}

/// Places of coherent allocations are this far apart: the largest allocation.
pub const COHERENT_STRIDE: u64 = 16 * PAGE;
/// How many places there are.
pub const COHERENT_PLACES: u64 = 4096;

/// A coherent allocation: 1 to 16 pages, half of them one page, on a multiple of its size.
fn coherent(address: u64, index: u64, private: bool) -> Request {
    let mut random = Random(index + 1);
    let order = (random.next() >> 7 & 7).saturating_sub(3);
    Request {
        address: address + scattered(index, COHERENT_PLACES) * COHERENT_STRIDE,
        pages: 1 << order,
        private,
    }
}

/// The requests of a Linux guest's boot: the swiotlb at `swiotlb`, then coherent allocations at `high`, of which every
/// third is given back.
pub fn boot(
    flavour: Flavour,
    ram_bytes: u64,
    swiotlb: u64,
    high: u64,
    allocations: u64,
) -> impl Iterator<Item = Request> + Clone {
    let pool = decrypted(flavour, swiotlb, swiotlb_bytes(ram_bytes));
    pool.chain((0..allocations).flat_map(move |index| {
        let given_back = (index % 3 == 2).then(|| coherent(high, index - 1, true));
        core::iter::once(coherent(high, index, false)).chain(given_back)
    }))
}
