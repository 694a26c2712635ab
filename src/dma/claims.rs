// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who has which addresses of the IOASes of a context.
//!
//! Invariant: nobody has an address that somebody else has. All addresses of a window are its own, also those where
//! nothing is mapped: the kernel refuses two areas in one place, but knows nothing of a page that is private at
//! the moment. Of a window that could not be closed it is those where areas are left, until the kernel gives them
//! up or their IOAS is gone.
//!
//! It holds as far as contexts can be told from one another: where kcmp says nothing, the kernel alone refuses.

use super::context::Context;
use crate::error::{Cause, Error, Of, Result};
use crate::kernel::Ioas;
use crate::run_set::RunSet;
use crate::sync::Arc;
use crate::units::{Iova, Span};

/// Whose addresses are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Whose {
    /// Some window's of the block that has this name.
    Block(Arc<str>),
    /// Nobody's: of pages of no meaning, mapped to try something, which the kernel would not unmap.
    Nobody,
    /// The same, while somebody has them unmapped: whoever did it, too, might meet what is mapped there next.
    NobodyForLong,
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
                Whose::Block(_) => at,
                // It can be in one area, which goes as a whole.
                Whose::Nobody | Whose::NobodyForLong => entry.iovas.around(at).unwrap_or(at),
            };
            Some(Conflict {
                number: entry.number,
                at,
                whose: entry.whose.clone(),
            })
        })
    }

    fn enter(&mut self, ioas_id: u32, iovas: Span<Iova>, whose: Whose) -> u64 {
        self.made += 1;
        self.entries.push(Entry {
            number: self.made,
            ioas_id,
            iovas: RunSet::of(&[iovas]),
            whose,
        });
        self.made
    }

    fn change(&mut self, number: u64, change: impl FnOnce(&mut RunSet<Iova>)) {
        let mut entries = self.entries.iter_mut();
        if let Some(entry) = entries.find(|entry| entry.number == number) {
            change(&mut entry.iovas);
        }
    }

    /// Whether nobody has what `number` names, who is then the one to unmap it.
    fn begin_to_clear(&mut self, number: u64) -> bool {
        let mut entries = self.entries.iter_mut();
        let found = entries.find(|entry| entry.number == number);
        let nobodys = found.filter(|entry| entry.whose == Whose::Nobody);
        let found = nobodys.map(|entry| entry.whose = Whose::NobodyForLong);
        found.is_some()
    }

    fn end_to_clear(&mut self, number: u64, cleared: bool) {
        if cleared {
            return self.leave(number);
        }
        let mut entries = self.entries.iter_mut();
        if let Some(entry) = entries.find(|entry| entry.number == number) {
            entry.whose = Whose::Nobody;
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
        claim.number = claim.unless_taken(iovas, |claims| claims.enter(ioas_id, iovas, whose))?;
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
                match claims.conflict(self.number, ioas.id, iovas) {
                    None => return Ok(take(&mut claims)),
                    Some(conflict) => conflict,
                }
            };
            // Of an IOAS that is gone, what others have says nothing.
            self.context.check(ioas)?;
            let Whose::Block(other) = conflict.whose else {
                if !self.context.claims().begin_to_clear(conflict.number) {
                    let what = format!(
                        "a page of no meaning is being taken out of IOAS {} at {}",
                        ioas.id, conflict.at
                    );
                    return Err(Error::busy(what).of(&self.block).with_remedy("try again"));
                }
                let cleared = self.context.clear_trial(ioas, conflict.at);
                let mut claims = self.context.claims();
                claims.end_to_clear(conflict.number, cleared.is_ok());
                cleared.of(&self.block)?;
                continue;
            };
            let what = format!(
                "a DMA window can't be at {iovas} of IOAS {}: {} of it is a DMA window's of {other}",
                ioas.id, conflict.at
            );
            return Err(Error::new(Cause::Exists, what)
                .of(&self.block)
                .with_remedy("remove that one first, or show this one elsewhere"));
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.context.claims().leave(self.number);
    }
}

impl Context {
    /// Pages of a trial could not be unmapped: nobody gets their addresses before that has been made up for.
    pub(super) fn bar(&self, ioas: Ioas, iovas: Span<Iova>) {
        self.claims().enter(ioas.id, iovas, Whose::Nobody);
    }

    /// What is barred, and where.
    pub(super) fn barred(&self) -> Vec<(u32, Span<Iova>)> {
        let claims = self.claims();
        let of_nobody = claims.entries.iter().filter(|e| e.whose == Whose::Nobody);
        let all = Span::between(0, !0xfff);
        let parts = of_nobody.flat_map(|entry| {
            let parts = entry.iovas.inside(all).into_iter();
            parts.map(|part| (entry.ioas_id, part))
        });
        parts.collect()
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
        let one = claims.enter(7, span(2, 4), named("one"));
        let other = claims.enter(7, span(6, 8), named("other"));
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
        let one = claims.enter(7, span(2, 6), named("one"));
        claims.change(one, |own| own.remove(span(3, 5)));
        assert_eq!(claims.conflict(0, 7, span(3, 5)), None);
        let met = claims.conflict(0, 7, span(3, 6)).unwrap();
        assert_eq!(met.at, span(5, 6));
        claims.leave(one);
        assert_eq!(claims.conflict(0, 7, span(0, 9)), None);
        let page = claims.enter(7, span(20, 22), Whose::Nobody);
        assert_eq!(
            claims.conflict(0, 7, span(21, 30)).unwrap().at,
            span(20, 22)
        );
        assert!(claims.begin_to_clear(page) && !claims.begin_to_clear(page));
        claims.end_to_clear(page, false);
        assert!(claims.begin_to_clear(page));
        claims.end_to_clear(page, true);
        assert_eq!(claims.conflict(0, 7, span(21, 30)), None);
        assert!(!claims.begin_to_clear(page));
        // A number is nobody else's later.
        assert_ne!(claims.enter(7, span(2, 6), named("two")), one);
        claims.change(one, |own| own.insert(span(0, 9)));
        assert_eq!(claims.conflict(0, 7, span(0, 2)), None);
    }
}
