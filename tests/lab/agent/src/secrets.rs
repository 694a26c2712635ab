// SPDX-License-Identifier: MIT OR Apache-2.0
//! Private bytes in a heap of others: a word of a pattern says which address it belongs to.

use crate::ledger::Ledger;

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const SEED: u64 = 0xd1b5_4a32_d192_ed03;
/// Patterns are at addresses below it. Any other word leads there once in a billion times, and then to a page that must
/// be private, too.
const HIGHEST: u64 = 16 << 30;

/// The inverse of an odd number: each round is right in twice as many bits.
const fn inverse(odd: u64) -> u64 {
    let mut found = odd;
    while odd.wrapping_mul(found) != 1 {
        found = found.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(found)));
    }
    found
}

/// The address at which the pattern of seed 0 has this word: what `pattern` does, backwards.
fn origin(word: u64) -> u64 {
    const BACK: u64 = inverse(STEP);
    let word = word ^ (word >> 29) ^ (word >> 58);
    word.wrapping_mul(BACK).rotate_left(3)
}

/// What the origin is to be combined with for another seed.
fn shift(seed: u64) -> u64 {
    seed.wrapping_mul(SEED).rotate_left(3)
}

/// The first word of `bytes`, at any multiple of four, that the guest has written to a private page with one of the
/// seeds: where it is there, and where in the guest.
pub fn find(bytes: &[u8], ledger: &Ledger, seeds: &[u64]) -> Option<(usize, u64)> {
    let shifts: Vec<u64> = seeds.iter().map(|&seed| shift(seed)).collect();
    let mut halves = bytes.chunks_exact(4).map(|half| {
        let half = half.try_into().expect("chunks of four bytes");
        u64::from(u32::from_le_bytes(half))
    });
    let mut low = halves.next()?;
    for (index, high) in halves.enumerate() {
        let word = high << 32 | low;
        low = high;
        if word == 0 {
            continue;
        }
        let plain = origin(word);
        for shift in &shifts {
            let gpa = plain ^ shift;
            if gpa < HIGHEST && gpa & 7 == 0 && ledger.is_private(gpa) {
                return Some((index * 4, gpa));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{find, origin, shift};
    use crate::ledger::{Block, Ledger, PAGE};
    use crate::monitor::protocol::pattern;

    #[test]
    fn a_word_tells_its_address() {
        for seed in [0, 1, 77, u64::MAX] {
            for gpa in [0, 8, 0x1234_5678, 5 << 30] {
                assert_eq!(origin(pattern(seed, gpa)) ^ shift(seed), gpa);
            }
        }
    }

    #[test]
    fn one_private_word_is_found_and_no_shared_one() {
        let mut ledger = Ledger::new(vec![Block::small("ram0", 4 * PAGE)]);
        ledger.convert(PAGE, PAGE, true);
        let mut bytes = vec![0; 20];
        bytes.extend(pattern(7, 8).to_le_bytes());
        bytes.extend(pattern(9, PAGE + 16).to_le_bytes());
        bytes.extend([1; 20]);
        assert_eq!(find(&bytes, &ledger, &[7]), None);
        assert_eq!(find(&bytes, &ledger, &[7, 9]), Some((28, PAGE + 16)));
    }
}
