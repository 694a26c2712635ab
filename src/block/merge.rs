// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is done to a guest_memfd that converted in place before it is closed.
//!
//! The kernel keeps the file's private runs in a maple tree, which it takes apart when the last user
//! of the file is gone. Linux 7.3's lib/maple_tree.c has two faults in doing that: a tree of more than
//! some 3,000 ranges can crash the host, and one whose root has exactly 16 children, which some
//! hundred private pages between shared ones make, frees an address that was never allocated. No bound
//! on runs keeps a guest from the second. A file without runs has no tree to take apart; so runs are
//! ended one by one, which never takes apart more than a node.
//!
//! They end as shared ones, since that fails for no reference that anybody holds, and since the VMM's
//! threads may still touch what they could touch before. Their memory goes first: nobody who has the
//! file mapped sees a private byte. A vCPU that runs on may touch such a page again before it is shared,
//! and have new memory, so that goes once more afterwards: what it wrote in between can be seen for
//! that moment, and nobody keeps a vCPU from that but who stops it.

use super::Block;
use crate::attributes::Attribute;
use crate::error::{Doing, Result};
use crate::plane::{Backing, Patience};
use crate::sync::atomic::Ordering;
use crate::units::{Offset, Span};
use log::{debug, warn};

/// With so few runs a tree's root has no 16 children, however they came about: that takes about 48.
const HARMLESS: u64 = 16;

impl Block {
    /// Whether its file may have runs that are to end before it is closed.
    pub(crate) fn may_have_runs(&self) -> bool {
        let converts = self.backing() == Backing::InPlace && self.core.confidential;
        converts && !self.merged.load(Ordering::Acquire)
    }

    /// Ends all private runs of the file, whose private bytes are lost. For the library the pages stay
    /// what they are. What can't be done is logged, and tried again the next time; once all is done,
    /// nothing happens. Nothing converts in the block any more, and the file is about to be closed. The
    /// caller has all of the block locked, or is the last one to have it.
    pub(crate) fn merge_runs(&self) {
        if self.may_have_runs() {
            let merged = self.try_merge();
            self.merged.store(merged, Ordering::Release);
        }
    }

    /// The block gets another file.
    pub(crate) fn expect_runs(&self) {
        self.merged.store(false, Ordering::Release);
    }

    /// Whether no run is left that does harm.
    fn try_merge(&self) -> bool {
        let runs = self.attributes().private_runs();
        if runs <= HARMLESS {
            return true;
        }
        // Huge pages go as a whole, and only if no device has a part of one.
        if self.core.planes.huge_page().is_some() {
            if let Err(error) = self.windows.withdraw(self.core.span) {
                warn!("{error}");
            }
        }
        // One for all: who ends is not to be kept waiting by each run.
        let mut patience = Patience::default();
        let mut failed = 0;
        let mut first_error = None;
        let mut at = 0;
        let private = |at| {
            let attributes = self.attributes();
            attributes.first_run(at, self.core.span.end(), Attribute::Private)
        };
        while let Some(run) = private(at) {
            at = run.end();
            if let Err(error) = self.end_run(run, &mut patience) {
                failed += 1;
                first_error.get_or_insert(error);
            }
        }
        match &first_error {
            None => debug!("{}: {runs} private runs are ended", self.core.name),
            Some(error) => warn!(
                "{}: {failed} of its {runs} private runs stay in the file that is closed now, or bytes of theirs ({error}): \
                 a host whose lib/maple_tree.c has the faults of Linux 7.3 may suffer from that; see \
                 \"What in place needs of the host's kernel\" in the documentation",
                self.core.name,
            ),
        }
        first_error.is_none()
    }

    fn end_run(&self, run: Span<Offset>, patience: &mut Patience) -> Result<()> {
        let kernel = self.core.machine.kernel();
        let file = self.file(Attribute::Private);
        let memory = self.core.planes.pages_around(run, Attribute::Private);
        // Such pages would be the device's and no longer the file's.
        self.check_unmapped(memory)?;
        let punch = |patience: &mut Patience| loop {
            match kernel.punch_hole(file, memory) {
                Err(error) if patience.allows(error.errno) => {}
                done => break done,
            }
        };
        let ended = punch(patience).and_then(|()| {
            self.convert_in_place(run, Attribute::Shared, patience)
                .map_err(|halted| halted.stopped.call)
        });
        // What a vCPU has written meanwhile.
        let ended = ended.and_then(|()| punch(patience));
        ended.doing(|| format!("ending the run {run}"))
    }
}
