// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who has which addresses of the IOASes of a context.
//!
//! Invariant: nobody has an address that somebody else has. All addresses of a window are its own, also those where
//! nothing is mapped: the kernel refuses two areas in one place, but knows nothing of a page that is private at
//! the moment. Of a window that could not be closed it is those where areas are left, until the kernel gives them
//! up or their IOAS is gone: also when there is no window any more. Then they are nobody's, and whoever wants
//! them, and the last who has any others in the context, unmaps what is there. He alone does so meanwhile.
//!
//! It holds as far as contexts can be told from one another: where kcmp says nothing, the kernel alone refuses.

use super::context::Context;
use crate::error::{Cause, Error, Of, Result};
use crate::kernel::Ioas;
use crate::run_set::RunSet;
use crate::sync::Arc;
use crate::throttle::limited;
use crate::units::{Iova, Span, PAGE_SIZE};

/// The end of all addresses, but for a page.
const ALL: u64 = u64::MAX - (PAGE_SIZE - 1);

/// Whose addresses are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Whose {
    /// Some window's of the block that has this name.
    Block(Arc<str>),
    /// The same, of one that nobody has any more and that its block closes as soon as that works.
    Abandoned(Arc<str>),
    /// Nobody's: pages of no meaning, mapped to try something, or what a window left, which the kernel would
    /// not unmap.
    Nobody,
    /// The same, and somebody tries to unmap some of it.
    Cleared,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    ioas_id: u32,
    iovas: RunSet<Iova>,
    whose: Whose,
}

/// What is in the way, of nobody's all of it.
#[derive(Debug, PartialEq, Eq)]
struct Conflict {
    number: u64,
    at: Span<Iova>,
    whose: Whose,
}

/// The books of a context.
#[derive(Debug, Default)]
pub(super) struct Claims {
    entries: Vec<Entry>,
    made: u64,
}

impl Claims {
    /// What anybody else than `number` has of `iovas`.
    fn conflict(&self, number: u64, ioas_id: u32, iovas: Span<Iova>) -> Option<Conflict> {
        let others = |entry: &&Entry| entry.ioas_id == ioas_id && entry.number != number;
        self.entries.iter().filter(others).find_map(|entry| {
            let at = entry.iovas.inside(iovas).first().copied()?;
            let at = match entry.whose {
                Whose::Block(_) | Whose::Abandoned(_) => at,
                // It can be in one area, which goes as a whole.
                Whose::Nobody | Whose::Cleared => entry.iovas.around(at).unwrap_or(at),
            };
            Some(Conflict {
                number: entry.number,
                at,
                whose: entry.whose.clone(),
            })
        })
    }

    fn enter(&mut self, ioas_id: u32, iovas: &[Span<Iova>], whose: Whose) -> u64 {
        self.made += 1;
        self.entries.push(Entry {
            number: self.made,
            ioas_id,
            iovas: RunSet::of(iovas),
            whose,
        });
        self.made
    }

    /// The same; what is nobody's is his who asks, until he puts it back.
    fn take_conflict(&mut self, number: u64, ioas_id: u32, iovas: Span<Iova>) -> Option<Conflict> {
        let conflict = self.conflict(number, ioas_id, iovas)?;
        if conflict.whose == Whose::Nobody {
            self.hand_over(conflict.number, Whose::Cleared);
        }
        Some(conflict)
    }

    /// From now on it is somebody else's.
    fn hand_over(&mut self, number: u64, to: Whose) {
        let mut entries = self.entries.iter_mut();
        if let Some(entry) = entries.find(|entry| entry.number == number) {
            entry.whose = to;
        }
    }

    /// Something of nobody's, if that is all there is.
    fn last_of_nobody(&self) -> Option<(u64, u32, Span<Iova>)> {
        let in_use = |entry: &Entry| entry.whose != Whose::Nobody && entry.iovas.runs() != 0;
        if self.entries.iter().any(in_use) {
            return None;
        }
        let mut entries = self.entries.iter();
        entries.find_map(|entry| {
            let run = entry.iovas.first_in(0, ALL, true)?;
            Some((entry.number, entry.ioas_id, run))
        })
    }

    fn change(&mut self, number: u64, change: impl FnOnce(&mut RunSet<Iova>)) {
        let mut entries = self.entries.iter_mut();
        if let Some(entry) = entries.find(|entry| entry.number == number) {
            change(&mut entry.iovas);
        }
    }

    fn leave(&mut self, number: u64) {
        self.entries.retain(|entry| entry.number != number);
    }
}

/// The addresses of one window, until it is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    context: Arc<Context>,
    ioas_id: u32,
    number: u64,
    block: Arc<str>,
}

impl Claim {
    /// `iovas` of an IOAS for a window of `block`.
    ///
    /// # Errors
    /// EEXIST if somebody has some of them; ENOENT if it is the IOAS that isn't there.
    pub(super) fn new(
        context: &Arc<Context>,
        ioas_id: u32,
        iovas: Span<Iova>,
        block: &str,
    ) -> Result<Self> {
        let block: Arc<str> = block.into();
        let whose = Whose::Block(block.clone());
        let mut claim = Self {
            context: context.clone(),
            ioas_id,
            number: 0,
            block,
        };
        claim.number =
            claim.unless_taken(iovas, |claims| claims.enter(ioas_id, &[iovas], whose))?;
        Ok(claim)
    }

    /// More of them. As [`Claim::new`].
    pub(super) fn extend(&self, iovas: Span<Iova>) -> Result<()> {
        let number = self.number;
        self.unless_taken(iovas, |claims| {
            claims.change(number, |own| own.insert(iovas));
        })
    }

    /// No more than these.
    pub(super) fn keep(&self, iovas: &[Span<Iova>]) {
        let kept = RunSet::of(iovas);
        self.context.claims().change(self.number, |own| *own = kept);
    }

    /// All but these.
    pub(super) fn give_up(&self, iovas: Span<Iova>) {
        let mut claims = self.context.claims();
        claims.change(self.number, |own| own.remove(iovas));
    }

    fn unless_taken<T>(&self, iovas: Span<Iova>, take: impl FnOnce(&mut Claims) -> T) -> Result<T> {
        let ioas = Ioas {
            iommufd: self.context.fd(),
            id: self.ioas_id,
        };
        loop {
            let conflict = {
                let mut claims = self.context.claims();
                match claims.take_conflict(self.number, ioas.id, iovas) {
                    None => return Ok(take(&mut claims)),
                    Some(conflict) => conflict,
                }
            };
            // Of an IOAS that is gone, what others have says nothing.
            if let Err(error) = self.context.check(ioas) {
                if conflict.whose == Whose::Nobody {
                    self.context.put_back(&conflict);
                }
                return Err(error);
            }
            let (owner, remedy) = match &conflict.whose {
                Whose::Nobody => {
                    let cleared = self.context.clear_taken(ioas.id, &conflict);
                    cleared.of(&self.block)?;
                    continue;
                }
                Whose::Cleared => {
                    let what = format!(
                        "what was left at {} of IOAS {} is being taken out",
                        conflict.at, ioas.id
                    );
                    return Err(Error::busy(what).of(&self.block).with_remedy("try again"));
                }
                Whose::Block(other) => (
                    format!("{} of it is a DMA window's of {other}", conflict.at),
                    "remove that one first, or show this one elsewhere",
                ),
                Whose::Abandoned(other) => (
                    format!(
                        "{} of it is mapped by a DMA window of {other} that could not be closed",
                        conflict.at
                    ),
                    "it has no owner any more and is tried again by itself: try again later",
                ),
            };
            let what = format!(
                "a DMA window can't be at {iovas} of IOAS {}: {owner}",
                ioas.id
            );
            return Err(Error::new(Cause::Exists, what)
                .of(&self.block)
                .with_remedy(remedy));
        }
    }

    /// Its window has nobody but the block.
    pub(super) fn abandon(&self) {
        let to = Whose::Abandoned(self.block.clone());
        self.context.claims().hand_over(self.number, to);
    }

    /// Its window has ended, and the kernel has `left` areas there.
    pub(super) fn leave_to_nobody(&self, left: &[Span<Iova>]) {
        let mut claims = self.context.claims();
        claims.leave(self.number);
        if !left.is_empty() {
            claims.enter(self.ioas_id, left, Whose::Nobody);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.context.claims().leave(self.number);
        self.context.clear_last();
    }
}

impl Context {
    /// Pages of a trial could not be unmapped: nobody gets their addresses before that has been made up for.
    pub(super) fn bar(&self, ioas: Ioas, left: &[Span<Iova>]) {
        self.claims().enter(ioas.id, left, Whose::Nobody);
    }

    /// What is nobody's of an IOAS that is gone has gone with it. What somebody is at he finds gone.
    pub(super) fn forget(&self, ioas_id: u32) {
        let mut claims = self.claims();
        let gone = |entry: &Entry| entry.ioas_id == ioas_id && entry.whose == Whose::Nobody;
        claims.entries.retain(|entry| !gone(entry));
    }

    /// Unmaps what is in the way, of nobody's, and has been [taken](Claims::take_conflict).
    fn clear_taken(&self, ioas_id: u32, taken: &Conflict) -> Result<()> {
        let ioas = Ioas {
            iommufd: self.fd(),
            id: ioas_id,
        };
        let cleared = self.clear(ioas, taken.at);
        if cleared.is_ok() {
            let mut claims = self.claims();
            claims.change(taken.number, |iovas| iovas.remove(taken.at));
        }
        self.put_back(taken);
        cleared
    }

    fn put_back(&self, taken: &Conflict) {
        let mut claims = self.claims();
        claims.hand_over(taken.number, Whose::Nobody);
        claims
            .entries
            .retain(|entry| entry.iovas.runs() != 0 || entry.whose != Whose::Nobody);
    }

    /// Nobody has any address of the context: whoever opened it may go on with it, and knows nothing of what
    /// is left.
    fn clear_last(&self) {
        loop {
            let (ioas_id, taken) = {
                let mut claims = self.claims();
                let Some((number, ioas_id, at)) = claims.last_of_nobody() else {
                    return;
                };
                claims.hand_over(number, Whose::Cleared);
                let whose = Whose::Nobody;
                (ioas_id, Conflict { number, at, whose })
            };
            if let Err(error) = self.clear_taken(ioas_id, &taken) {
                limited!(error, "{error}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first: u64, end: u64) -> Span<Iova> {
        Span::between(first * 4096, end * 4096)
    }

    fn named(name: &str) -> Whose {
        Whose::Block(name.into())
    }

    #[test]
    fn what_one_has_no_other_gets() {
        let mut claims = Claims::default();
        let one = claims.enter(7, &[span(2, 4)], named("one"));
        let other = claims.enter(7, &[span(6, 8)], named("other"));
        let met = claims.conflict(0, 7, span(0, 8)).unwrap();
        assert_eq!((met.at, met.whose), (span(2, 4), named("one")));
        // Neighbours, another IOAS, and itself.
        for (number, ioas_id, iovas) in [
            (0, 7, span(4, 6)),
            (0, 7, span(0, 2)),
            (0, 8, span(0, 8)),
            (one, 7, span(0, 6)),
        ] {
            assert_eq!(claims.conflict(number, ioas_id, iovas), None);
        }
        let met = claims.conflict(one, 7, span(0, 7)).unwrap();
        assert_eq!((met.number, met.at), (other, span(6, 7)));
    }

    #[test]
    fn what_is_given_up_is_free() {
        let mut claims = Claims::default();
        let one = claims.enter(7, &[span(2, 6)], named("one"));
        claims.change(one, |own| own.remove(span(3, 5)));
        assert_eq!(claims.conflict(0, 7, span(3, 5)), None);
        let met = claims.conflict(0, 7, span(3, 6)).unwrap();
        assert_eq!(met.at, span(5, 6));
        claims.leave(one);
        assert_eq!(claims.conflict(0, 7, span(0, 9)), None);
        // A number is nobody else's later.
        assert_ne!(claims.enter(7, &[span(2, 6)], named("two")), one);
        claims.change(one, |own| own.insert(span(0, 9)));
        assert_eq!(claims.conflict(0, 7, span(0, 2)), None);
    }

    #[test]
    fn what_is_nobodys_is_his_who_asks_until_he_puts_it_back() {
        let mut claims = Claims::default();
        let left = claims.enter(7, &[span(20, 22), span(30, 31)], Whose::Nobody);
        let taken = claims.take_conflict(0, 7, span(21, 40)).unwrap();
        assert_eq!((taken.at, taken.whose), (span(20, 22), Whose::Nobody));
        let met = claims.take_conflict(0, 7, span(20, 21)).unwrap();
        assert_eq!((met.at, met.whose), (span(20, 22), Whose::Cleared));
        assert_eq!(claims.last_of_nobody(), None);
        claims.change(left, |iovas| iovas.remove(span(20, 22)));
        claims.hand_over(left, Whose::Nobody);
        assert_eq!(claims.last_of_nobody(), Some((left, 7, span(30, 31))));
        // Where somebody has anything else, that is for who wants it.
        let one = claims.enter(8, &[span(0, 1)], named("one"));
        assert_eq!(claims.last_of_nobody(), None);
        // One that has ended and that somebody still holds has nothing.
        claims.change(one, |iovas| iovas.remove(span(0, 1)));
        assert!(claims.last_of_nobody().is_some());
    }
}
