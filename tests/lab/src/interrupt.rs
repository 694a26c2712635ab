// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ctrl-C: everything that waits looks here, ends its children and leaves the cache as it was.

use anyhow::{bail, Result};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static SIGNALS: AtomicUsize = AtomicUsize::new(0);
static ABANDONED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    // A second Ctrl-C means "at once": children follow by their parent-death signal.
    if SIGNALS.fetch_add(1, Ordering::SeqCst) > 0 {
        // SAFETY: _exit is async-signal-safe.
        unsafe { libc::_exit(130) }
    }
}

/// Turns SIGINT, SIGTERM and SIGHUP into a flag.
pub fn install() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only touches an atomic and calls _exit.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as *const () as usize;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Ends what runs beside something that failed: its result would not be used.
pub fn abandon() {
    ABANDONED.store(true, Ordering::SeqCst);
}

/// Whether whatever waits should stop waiting.
pub fn requested() -> bool {
    signalled() || ABANDONED.load(Ordering::SeqCst)
}

/// Whether it was the user who asked.
pub fn signalled() -> bool {
    SIGNALS.load(Ordering::SeqCst) > 0
}

/// An error once the user asked for an end.
pub fn check_signal() -> Result<()> {
    if signalled() {
        bail!(
            "interrupted; what was finished stays in the cache and the next run goes on from there"
        );
    }
    Ok(())
}

/// An error once there is a reason to stop.
pub fn check() -> Result<()> {
    check_signal()?;
    if requested() {
        bail!("given up because another step failed");
    }
    Ok(())
}
