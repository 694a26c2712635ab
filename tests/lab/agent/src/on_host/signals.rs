// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whoever wants us to end is obeyed after everything is given back.

use std::sync::atomic::{AtomicI32, Ordering};

static CAUGHT: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: libc::c_int) {
    CAUGHT.store(signal, Ordering::SeqCst);
}

/// From now on these only set a flag; system calls return early. What whoever started us has us ignore (nohup) stays ignored.
pub fn catch() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: a zeroed sigaction is a valid one, both outlive the calls, and the handler only stores to an atomic.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let mut before: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut before);
            if before.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            action.sa_sigaction = note as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// A line of the standard input; `None` at its end, and when somebody wants us to end.
pub fn line() -> Option<String> {
    let mut line = Vec::new();
    loop {
        if caught() {
            return None;
        }
        let mut poll = libc::pollfd {
            fd: 0,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one structure, which outlives the call.
        if unsafe { libc::poll(&mut poll, 1, 200) } <= 0 {
            continue;
        }
        let mut byte = 0u8;
        // SAFETY: one byte, which outlives the call.
        match unsafe { libc::read(0, (&raw mut byte).cast(), 1) } {
            1 if byte == b'\n' => return String::from_utf8(line).ok(),
            1 => line.push(byte),
            _ => return None,
        }
    }
}

pub fn caught() -> bool {
    CAUGHT.load(Ordering::SeqCst) != 0
}
