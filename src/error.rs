// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can go wrong, as a sentence for a person and an errno for a program.

use crate::kernel::{holders, CallError};
use crate::units::PAGE_SIZE;
use std::fmt;

/// The result of everything public here.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this library. [`fmt::Display`] gives the sentence a user should read, and
/// [`Error::errno`] the number that the C ABI returns negated. The sentence is made when it is asked for:
/// that of [`Error::Held`] takes a look at all files of the process, which `{:#}` leaves out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// An argument that makes no sense: EINVAL.
    Invalid(String),
    /// This version or this kernel can't do what was asked: ENOTSUP.
    Unsupported(String),
    /// Somebody still uses it: EBUSY.
    Busy(String),
    /// It is there already: EEXIST.
    Exists(String),
    /// Private memory was to be touched as if it were shared: EACCES.
    Denied(String),
    /// A bound that protects the host was reached: ENOSPC.
    Exhausted(String),
    /// The host's hardware has lost the memory: EIO.
    Poisoned(String),
    /// The library has no memory of its own for what was asked: ENOMEM.
    OutOfMemory(String),
    /// A listener refused: its errno.
    Refused {
        /// What was refused.
        doing: String,
        /// Positive errno of the listener.
        errno: i32,
    },
    /// A system call failed: its errno.
    Kernel {
        /// What the library was doing.
        doing: String,
        /// The call and its errno.
        call: CallError,
    },
    /// A page can't become private because somebody holds it: EAGAIN.
    Held {
        /// What the library was doing.
        doing: String,
        /// Which page of the block.
        offset: u64,
        /// Where it is mapped: by that, who holds it may be found.
        host: u64,
        /// The call and its errno.
        call: CallError,
    },
}

impl Error {
    /// Positive errno.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Invalid(_) => libc::EINVAL,
            Error::Unsupported(_) => libc::ENOTSUP,
            Error::Busy(_) => libc::EBUSY,
            Error::Exists(_) => libc::EEXIST,
            Error::Denied(_) => libc::EACCES,
            Error::Exhausted(_) => libc::ENOSPC,
            Error::Poisoned(_) => libc::EIO,
            Error::OutOfMemory(_) => libc::ENOMEM,
            Error::Refused { errno, .. } => *errno,
            Error::Kernel { call, .. } | Error::Held { call, .. } => call.errno,
        }
    }

    /// Adds to what was being done when a system call failed.
    pub(crate) fn with_remark(self, remark: &str) -> Self {
        match self {
            Error::Kernel { doing, call } => Error::Kernel {
                doing: format!("{doing} ({remark})"),
                call,
            },
            other => other,
        }
    }

    /// Adds what ENOTTY says of a file that was to be an iommufd.
    pub(crate) fn of_iommufd(self) -> Self {
        match self {
            Error::Kernel { doing, call } if call.errno == libc::ENOTTY => Error::Kernel {
                doing: format!("{doing} (the file is no /dev/iommu, or its kernel lacks the call)"),
                call,
            },
            other => other,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Invalid(text)
            | Error::Unsupported(text)
            | Error::Busy(text)
            | Error::Exists(text)
            | Error::Denied(text)
            | Error::Exhausted(text)
            | Error::Poisoned(text)
            | Error::OutOfMemory(text) => f.write_str(text),
            Error::Refused { doing, errno } => {
                write!(f, "{doing}: a listener refused: {}", errno_text(*errno))
            }
            Error::Kernel { doing, call } => write!(f, "{doing}: {call}"),
            Error::Held {
                doing,
                offset,
                host,
                call,
            } => {
                write!(f, "{doing}, stopped at offset {offset:#x}")?;
                if !f.alternate() {
                    let page = *host..host.saturating_add(PAGE_SIZE);
                    write!(f, " ({})", holders::describe(page))?;
                }
                write!(f, ": {call}")
            }
        }
    }
}

impl std::error::Error for Error {}

/// Says what was being done when a system call failed.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for std::result::Result<T, CallError> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|call| Error::Kernel {
            doing: what(),
            call,
        })
    }
}

/// What the C library says of an errno, without the "(os error N)" that Rust appends.
pub(crate) fn errno_text(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error") {
        Some(at) => text[..at].to_string(),
        None => text,
    }
}
