// SPDX-License-Identifier: MIT OR Apache-2.0
//! The three kinds of address, kept apart by type, and ranges of them.

use std::fmt;

/// Size in bytes of the page that attributes, guests and this library count in.
pub const PAGE_SIZE: u64 = 4096;

/// A 64-bit address of one kind.
pub trait Address: Copy + Ord + fmt::Debug {
    /// What messages call this kind of address.
    const KIND: &'static str;
    /// The bare number of bytes.
    fn get(self) -> u64;
    /// The address that `bytes` names.
    fn new(bytes: u64) -> Self;
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl Address for $name {
            const KIND: &'static str = $kind;
            fn get(self) -> u64 {
                self.0
            }
            fn new(bytes: u64) -> Self {
                Self(bytes)
            }
        }
    };
}

address!(
    /// Bytes from the start of a block.
    Offset,
    "offset"
);
address!(
    /// A guest physical address.
    Gpa,
    "gpa"
);
address!(
    /// An I/O virtual address: what a device puts on the bus.
    Iova,
    "iova"
);

/// A range of addresses: not empty, page aligned, not wrapping. Only [`Span::new`] makes one from
/// numbers that came from outside.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span<A> {
    start: A,
    size_bytes: u64,
}

impl<A: Address> Span<A> {
    /// The range of `size_bytes` from `start`, or `None` when it is empty, not page aligned, or
    /// runs past the end of the address space.
    pub fn new(start: A, size_bytes: u64) -> Option<Self> {
        let aligned = start.get() % PAGE_SIZE == 0 && size_bytes % PAGE_SIZE == 0;
        (aligned && size_bytes != 0 && start.get().checked_add(size_bytes).is_some())
            .then_some(Self { start, size_bytes })
    }

    /// Why [`Span::new`] gives nothing, as what is said of bytes: "0x10 bytes at … are not whole pages".
    pub(crate) fn flaw(start: u64, size_bytes: u64) -> &'static str {
        if size_bytes == 0 {
            "are none"
        } else if start % PAGE_SIZE != 0 || size_bytes % PAGE_SIZE != 0 {
            "are not whole pages of 4096 bytes"
        } else {
            // The last page could be named, but not its end.
            "reach the end of the 64-bit address space"
        }
    }

    /// From `start` to `end`, exclusive. The caller knows that both are page aligned and in order.
    pub(crate) fn between(start: u64, end: u64) -> Self {
        debug_assert!(start < end && start % PAGE_SIZE == 0 && end % PAGE_SIZE == 0);
        Self {
            start: A::new(start),
            size_bytes: end - start,
        }
    }

    /// First address.
    pub fn start(&self) -> A {
        self.start
    }

    /// First address, as bare bytes.
    pub fn first(&self) -> u64 {
        self.start.get()
    }

    /// End, exclusive, as bare bytes.
    pub fn end(&self) -> u64 {
        self.start.get() + self.size_bytes
    }

    /// Length in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether every address of `other` is in this range.
    pub fn contains(&self, other: &Self) -> bool {
        self.first() <= other.first() && other.end() <= self.end()
    }

    /// Whether the two ranges share an address.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.first() < other.end() && other.first() < self.end()
    }

    /// The part that both ranges cover.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let start = self.first().max(other.first());
        let end = self.end().min(other.end());
        (start < end).then(|| Self::between(start, end))
    }

    /// The range of another kind of address that shows `part` of this one, where this range's
    /// start appears at `at`.
    pub(crate) fn translate<B: Address>(&self, part: &Self, at: B) -> Span<B> {
        debug_assert!(self.contains(part));
        let start = at.get() + (part.first() - self.first());
        Span::between(start, start + part.size_bytes)
    }

    /// The range cut into pieces of `size_bytes`, a multiple of the page size; the last is what is
    /// left.
    pub(crate) fn chunks(self, size_bytes: u64) -> impl Iterator<Item = Self> {
        (self.first()..self.end())
            .step_by(size_bytes as usize)
            .map(move |at| Self::between(at, self.end().min(at + size_bytes)))
    }

    /// What it has of each unit that it touches, in order. `unit_bytes` is a power of two.
    pub(crate) fn pieces(self, unit_bytes: u64) -> impl Iterator<Item = Self> {
        let mut at = self.first();
        std::iter::from_fn(move || {
            let end = self.end().min((at / unit_bytes + 1) * unit_bytes);
            let piece = (at < self.end()).then(|| Self::between(at, end));
            at = end;
            piece
        })
    }

    /// The smallest range of whole units around this one. `unit_bytes` is a power of two.
    pub(crate) fn hull(&self, unit_bytes: u64) -> Self {
        let start = self.first() & !(unit_bytes - 1);
        let end = (self.end() - 1) | (unit_bytes - 1);
        Self::between(start, end.saturating_add(1) & !(PAGE_SIZE - 1))
    }

    /// The whole units in this range. `unit_bytes` is a power of two.
    pub(crate) fn whole_units(&self, unit_bytes: u64) -> u64 {
        let first = self.first().div_ceil(unit_bytes);
        (self.end() / unit_bytes).saturating_sub(first)
    }

    /// The whole units in this range, if there are any. `unit_bytes` is a power of two.
    pub(crate) fn whole(&self, unit_bytes: u64) -> Option<Self> {
        let start = self.first().checked_next_multiple_of(unit_bytes)?;
        let end = self.end() & !(unit_bytes - 1);
        (start < end).then(|| Self::between(start, end))
    }

    /// Both ends are multiples of `unit_bytes`.
    pub(crate) fn is_aligned(&self, unit_bytes: u64) -> bool {
        self.first() % unit_bytes == 0 && self.size_bytes % unit_bytes == 0
    }
}

/// The pages that `size` bytes at `address` have a part in. `None` if there are none, or if they wrap
/// around.
pub(crate) fn pages_around<A: Address>(address: u64, size: u64) -> Option<Span<A>> {
    let page = PAGE_SIZE - 1;
    let end = address
        .checked_add(size)?
        .checked_add(page)
        .map(|end| end & !page)?;
    (size != 0).then(|| Span::between(address & !page, end))
}

impl<A: Address> fmt::Display for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x}..{:#x}", A::KIND, self.first(), self.end())
    }
}

impl<A: Address> fmt::Debug for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_never_empty_unaligned_or_wrapping() {
        assert!(Span::new(Gpa(0), 0).is_none());
        assert!(Span::new(Gpa(1), PAGE_SIZE).is_none());
        assert!(Span::new(Gpa(0), PAGE_SIZE + 1).is_none());
        assert!(Span::new(Gpa(u64::MAX - PAGE_SIZE + 1), PAGE_SIZE).is_none());
        assert!(Span::new(Gpa(PAGE_SIZE), u64::MAX - PAGE_SIZE + 1).is_none());
        assert_eq!(Span::new(Gpa(PAGE_SIZE), PAGE_SIZE).unwrap().end(), 8192);
    }

    #[test]
    fn translation_keeps_distance_and_length() {
        let block: Span<Offset> = Span::between(0x10000, 0x20000);
        let part = Span::between(0x12000, 0x14000);
        let seen: Span<Gpa> = block.translate(&part, Gpa(0x8000_0000));
        assert_eq!(seen, Span::between(0x8000_2000, 0x8000_4000));
    }
}
