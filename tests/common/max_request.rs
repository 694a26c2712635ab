// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a request changes, as `max_request` counts it.

use gmem::{Attribute, Block, Cause};
use proptest::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Bounds of a test whose requests have so many pages at most: none as often as not.
pub fn bound(most: u64) -> impl Strategy<Value = Option<u64>> {
    prop_oneof![Just(None), (1..most).prop_map(Some)]
}

/// How many pages a request would change in blocks of `each` pages, from the first to the last one in each
/// of them, up to the block where that is more than `most`, if it ever is.
fn too_many(
    oracle: &[Attribute],
    each: u64,
    request: Range<u64>,
    attribute: Attribute,
    most: u64,
) -> Option<u64> {
    let mut changing = 0;
    for first in (0..oracle.len() as u64).step_by(each as usize) {
        let part = request.start.max(first)..request.end.min(first + each);
        let changes = |page: &u64| oracle[*page as usize] != attribute;
        let first = part.clone().find(changes);
        let last = part.rev().find(changes);
        changing += first.zip(last).map_or(0, |(first, last)| last - first + 1);
        if changing > most {
            return Some(changing);
        }
    }
    None
}

/// Holds what became of a request against what the oracle said before, with a bound of `most` pages. Answers
/// whether it was to be refused.
pub fn check(
    blocks: &[Arc<Block>],
    oracle: &[Attribute],
    request: Range<u64>,
    attribute: Attribute,
    most: Option<u64>,
    convert: impl FnOnce() -> gmem::Result<()>,
) -> bool {
    let each = (oracle.len() / blocks.len()) as u64;
    let expected = most.and_then(|most| too_many(oracle, each, request, attribute, most));
    let refused = |blocks: &[Arc<Block>]| {
        let refused = blocks.iter().map(|block| block.stats().requests_refused);
        refused.sum::<u64>()
    };
    let before = refused(blocks);
    let result = convert();
    let counted = u64::from(expected.is_some());
    assert_eq!(refused(blocks), before + counted);
    match (expected, most) {
        (Some(pages), Some(most)) => assert_eq!(
            *result.unwrap_err().cause(),
            Cause::MaxRequest {
                bytes: pages * gmem::PAGE_SIZE,
                most: most * gmem::PAGE_SIZE
            }
        ),
        _ => result.unwrap(),
    }
    expected.is_some()
}
