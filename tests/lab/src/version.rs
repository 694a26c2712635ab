// SPDX-License-Identifier: MIT OR Apache-2.0
//! Debian's ordering of versions: `1.0~rc1 < 1.0 < 1.0-1 < 1:0.9`.

use std::cmp::Ordering;

/// Compares two Debian versions as dpkg does.
pub fn compare(left: &str, right: &str) -> Ordering {
    let (left, right) = (split(left), split(right));
    left.0
        .cmp(&right.0)
        .then_with(|| compare_part(left.1, right.1))
        .then_with(|| compare_part(left.2, right.2))
}

/// The part between epoch and Debian revision: `1:11.1.1+ds-1` gives `11.1.1+ds`.
pub fn upstream(version: &str) -> &str {
    split(version).1
}

fn split(version: &str) -> (u64, &str, &str) {
    let (epoch, rest) = match version.split_once(':') {
        Some((epoch, rest)) => (epoch.parse().unwrap_or(0), rest),
        None => (0, version),
    };
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, ""));
    (epoch, upstream, revision)
}

fn compare_part(left: &str, right: &str) -> Ordering {
    let (mut left, mut right) = (left.as_bytes(), right.as_bytes());
    while !left.is_empty() || !right.is_empty() {
        while starts_with_text(left) || starts_with_text(right) {
            let order = weight(left.first()).cmp(&weight(right.first()));
            if order != Ordering::Equal {
                return order;
            }
            left = &left[1..];
            right = &right[1..];
        }
        let (left_number, left_rest) = number(left);
        let (right_number, right_rest) = number(right);
        // Longer without leading zeros is larger, and no width of integer bounds it.
        let order = (left_number.len().cmp(&right_number.len()))
            .then_with(|| left_number.cmp(right_number));
        if order != Ordering::Equal {
            return order;
        }
        left = left_rest;
        right = right_rest;
    }
    Ordering::Equal
}

fn starts_with_text(part: &[u8]) -> bool {
    part.first().is_some_and(|byte| !byte.is_ascii_digit())
}

/// `~` sorts before the end, the end (or a digit) before letters, letters before the rest.
fn weight(byte: Option<&u8>) -> i32 {
    match byte {
        None => 0,
        Some(byte) if byte.is_ascii_digit() => 0,
        Some(b'~') => -1,
        Some(byte) if byte.is_ascii_alphabetic() => i32::from(*byte),
        Some(byte) => i32::from(*byte) + 256,
    }
}

fn number(part: &[u8]) -> (&[u8], &[u8]) {
    let zeros = part.iter().take_while(|byte| **byte == b'0').count();
    let part = &part[zeros..];
    let digits = part.iter().take_while(|byte| byte.is_ascii_digit()).count();
    part.split_at(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_as_dpkg_sorts_them() {
        let ascending = [
            "0.9~~",
            "0.9~",
            "0.9",
            "1.0~rc1-1",
            "1.0-1~bpo13+1",
            "1.0-1",
            "1.0-1+b1",
            "1.0-2",
            "1.0a-1",
            "1.0+ds-1",
            "1.9",
            "1.10",
            "1:0.1",
        ];
        for pair in ascending.windows(2) {
            assert_eq!(
                compare(pair[0], pair[1]),
                Ordering::Less,
                "{} < {}",
                pair[0],
                pair[1]
            );
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater);
        }
    }

    #[test]
    fn leading_zeros_do_not_count() {
        assert_eq!(compare("1.01", "1.1"), Ordering::Equal);
        assert_eq!(compare("0:1", "1"), Ordering::Equal);
    }

    #[test]
    fn parts_are_told_apart() {
        assert_eq!(upstream("1:11.1.1+ds-1"), "11.1.1+ds");
        assert_eq!(upstream("7.3.4-1~bpo13+1"), "7.3.4");
    }
}
