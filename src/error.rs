// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can go wrong: fields for a program, and the sentence for a person that is made from them.

use crate::kernel::{holders, CallError};
use crate::units::{Offset, Span, PAGE_SIZE};
use std::borrow::Cow;
use std::fmt;

/// The result of everything public here.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this library: whose, what was being done or what is wrong, why, and what to do about it.
///
/// [`Error::cause`] tells causes apart that share an errno; [`Error::errno`] is the number that the C ABI
/// returns negated. [`fmt::Display`] makes the sentence that a user should read, from all of the fields,
/// when it is asked for: that of [`Cause::Held`] takes a look at all files of the process, which `{:#}` leaves
/// out.
///
/// ```
/// # fn serve(vm: &gmem::Vm, gpa: u64, size: u64) -> Result<(), &'static str> {
/// use gmem::{Attribute, Cause};
/// if let Err(error) = vm.convert(gpa, size, Attribute::Private) {
///     return Err(match error.cause() {
///         Cause::MaxRuns { .. } | Cause::MaxRequest { .. } => "the guest asks for too much",
///         Cause::PoolEmpty(_) => "the host has no huge page left",
///         Cause::Held { .. } => "somebody holds a page: again, later",
///         _ if error.errno() == libc::EINVAL => "no such memory",
///         _ => "the host's fault",
///     });
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, PartialEq, Eq)]
// One word: a result of nothing is no more than that on the way that most requests take.
pub struct Error(Box<Inner>);

#[derive(Clone, PartialEq, Eq)]
struct Inner {
    object: Option<String>,
    what: String,
    cause: Cause,
    because: Option<Error>,
    remedy: Option<Cow<'static, str>>,
}

/// Why something failed. What state that leaves is said where the call is described; unless something else
/// is said there, all is as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// An argument makes no sense, or a guest asks for what is not to be had: EINVAL, and nothing has happened. The
    /// same fails again: ask for something else, or tell the guest.
    Invalid,
    /// This version, this kernel or this type of VM can't do it: ENOTSUP, and nothing has happened. The remedy says
    /// what to leave out, or which kernel has it. [`Error::call`] is what the kernel was found out by, if it was tried.
    Unsupported,
    /// Somebody uses it, or something is under way there: EBUSY, and nothing has happened. End what is named and try
    /// again.
    Busy,
    /// The VM has no file, between [`Vm::detach`](crate::Vm::detach) and [`Vm::attach`](crate::Vm::attach):
    /// EBUSY, and nothing has happened. Once it is attached, try again.
    Detached,
    /// The VM is at its [end](crate::Vm::end): EBUSY, and nothing has happened. Nothing converts any more.
    Ended,
    /// It is there already: EEXIST, and nothing has happened. Unbind or remove what is named first.
    Exists,
    /// Private memory was to be touched as if it were shared, or the other way around: EACCES. Nobody touched it; it is
    /// the guest's to convert it.
    Denied,
    /// A conversion would leave more private runs than [`max_runs`](crate::BlockConfig::max_runs): ENOSPC. It is
    /// refused and counted, and nothing has happened. Runs that the guest joins make room for it; a larger bound does,
    /// for a new block.
    MaxRuns {
        /// So many there would be.
        runs: u64,
        /// `max_runs` of the block.
        most: u64,
    },
    /// A request would change more at once than [`max_request`](crate::BlockConfig::max_request): ENOSPC. It is
    /// refused and counted, and nothing has happened. In smaller requests it can be done.
    MaxRequest {
        /// From the first page that would change to the last, in all blocks up to the one that is named.
        bytes: u64,
        /// `max_request` of that block.
        most: u64,
    },
    /// Memory that can't be given back would have to be zeroed, and that is too much: ENOSPC. Nothing has happened, or,
    /// if others converted meanwhile, a part is discarded. Discard less at once, or whole huge pages.
    MaxZeroed {
        /// So much of the range.
        bytes: u64,
        /// The bound.
        most: u64,
    },
    /// The host's pool of huge pages, or a limit of it (hugetlb cgroup), has not enough: ENOMEM, whatever the call's own
    /// errno is (ENOSPC as a rule), since ENOSPC is for what a block's bounds refuse: a guest may be told to ask again
    /// for the one, and not for the other. Undone. The remedy names the pool: enlarge it, or have others give pages
    /// back, and try again.
    PoolEmpty(CallError),
    /// There is no thread to be had that could allocate by a NUMA policy: EAGAIN. Try again when the process may have
    /// more threads.
    NoThread,
    /// The host's hardware has lost the memory: EIO. Nothing has happened. A reset of the VM
    /// ([`Block::reset`](crate::Block::reset)) gives these pages fresh memory.
    Poisoned {
        /// The first range that is lost.
        lost: Span<Offset>,
    },
    /// The library has no memory of its own for the request: ENOMEM, and nothing has happened. Free some, or ask for
    /// less at once.
    OutOfMemory,
    /// A [`Listener`](crate::Listener) refused. Undone: others who were told have heard that nothing changed. What to
    /// do is for its owner to say.
    Refused {
        /// Its positive errno.
        errno: i32,
    },
    /// A system call failed: its errno. What was done before is undone; where that failed as well, devices
    /// don't reach the range (it is *quarantined*), and the log says so. ENOMEM, EAGAIN and the like may pass.
    Call(CallError),
    /// A page can't become private in place because somebody holds a reference to it: EAGAIN. Undone. Once whoever
    /// holds it lets go (the sentence names him if he can be found in this process), try again: it was tried for a
    /// tenth of a second.
    Held {
        /// Which page of the block.
        offset: u64,
        /// Where it is mapped: by that, who holds it may be found.
        host: u64,
        /// The call and its errno.
        call: CallError,
    },
}

impl Cause {
    /// Positive errno.
    pub fn errno(&self) -> i32 {
        match self {
            Cause::Invalid => libc::EINVAL,
            Cause::Unsupported => libc::ENOTSUP,
            Cause::Busy | Cause::Detached | Cause::Ended => libc::EBUSY,
            Cause::Exists => libc::EEXIST,
            Cause::Denied => libc::EACCES,
            Cause::MaxRuns { .. } | Cause::MaxRequest { .. } | Cause::MaxZeroed { .. } => {
                libc::ENOSPC
            }
            Cause::NoThread => libc::EAGAIN,
            Cause::Poisoned { .. } => libc::EIO,
            Cause::OutOfMemory | Cause::PoolEmpty(_) => libc::ENOMEM,
            Cause::Refused { errno } => *errno,
            Cause::Call(call) | Cause::Held { call, .. } => call.errno,
        }
    }

    /// The system call that failed, if one did.
    pub fn call(&self) -> Option<&CallError> {
        match self {
            Cause::Call(call) | Cause::PoolEmpty(call) | Cause::Held { call, .. } => Some(call),
            _ => None,
        }
    }

    /// How the sentence goes on after what was being done.
    fn go_on(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::MaxRuns { runs, most } => {
                write!(f, " would leave {runs} private runs; max-runs is {most}")
            }
            Cause::MaxRequest { bytes, most } => write!(
                f,
                " would change {bytes:#x} bytes at once, from the first page that changes to the last, in all \
                 blocks; max-request is {most:#x}"
            ),
            Cause::MaxZeroed { bytes, most } => write!(
                f,
                ": {bytes:#x} bytes are parts of huge pages, whose memory can't be given back; no more than \
                 {most:#x} are zeroed instead"
            ),
            Cause::Refused { errno } => write!(f, ": a listener refused: {}", errno_text(*errno)),
            Cause::Call(call) | Cause::PoolEmpty(call) => write!(f, ": {call}"),
            Cause::Held { offset, host, call } => {
                write!(f, ", stopped at offset {offset:#x}")?;
                if !f.alternate() {
                    let page = *host..host.saturating_add(PAGE_SIZE);
                    write!(f, " ({})", holders::describe(page))?;
                }
                write!(f, ": {call}")
            }
            Cause::Invalid
            | Cause::Unsupported
            | Cause::Busy
            | Cause::Detached
            | Cause::Ended
            | Cause::Exists
            | Cause::Denied
            | Cause::NoThread
            | Cause::Poisoned { .. }
            | Cause::OutOfMemory => Ok(()),
        }
    }
}

impl Error {
    /// Positive errno.
    pub fn errno(&self) -> i32 {
        self.0.cause.errno()
    }

    /// Why.
    pub fn cause(&self) -> &Cause {
        &self.0.cause
    }

    /// Whose error it is, by the name that messages call it: a block's, or "IOAS 5". `None` if it is no one
    /// object's, or the VM's.
    pub fn object(&self) -> Option<&str> {
        self.0.object.as_deref()
    }

    /// What was being done, of which pages, or what is wrong: for who writes the fields to a log of his own.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// The system call that failed, if one did: of the cause, or of what led to it.
    pub fn call(&self) -> Option<&CallError> {
        let because = || self.0.because.as_ref().and_then(Self::call);
        self.0.cause.call().or_else(because)
    }

    /// What `hypercall.ret` of a KVM_HC_MAP_GPA_RANGE exit is to hold for a request that failed with it: EAGAIN or
    /// EINVAL, positive, and nothing else (kvm_is_valid_map_gpa_range_ret); 0 is for one that did not. With
    /// `can_retry` EAGAIN and ENOMEM are EAGAIN: for guests that take that for "ask again" (TDX). For others it is
    /// fatal.
    pub fn hypercall_result(&self, can_retry: bool) -> u64 {
        hypercall_result(self.errno(), can_retry)
    }

    /// What its user can do about it, or should look at.
    pub fn remedy(&self) -> Option<&str> {
        let because = || self.0.because.as_ref().and_then(Self::remedy);
        self.0.remedy.as_deref().or_else(because)
    }
}

/// Making them: `Error::invalid("a size of …").of("ram").with_remedy("…")`.
impl Error {
    /// `what` was being done, or is wrong: all of the sentence that no other field says.
    #[cold]
    pub(crate) fn new(cause: Cause, what: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            object: None,
            what: what.into(),
            cause,
            because: None,
            remedy: None,
        }))
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::new(Cause::Invalid, what)
    }

    pub(crate) fn unsupported(what: impl Into<String>) -> Self {
        Self::new(Cause::Unsupported, what)
    }

    pub(crate) fn busy(what: impl Into<String>) -> Self {
        Self::new(Cause::Busy, what)
    }

    pub(crate) fn denied(what: impl Into<String>) -> Self {
        Self::new(Cause::Denied, what)
    }

    /// Says whose it is, unless that is known.
    pub(crate) fn of(mut self, object: &str) -> Self {
        self.0.object.get_or_insert_with(|| object.to_string());
        self
    }

    /// What led to it, which its sentence ends with.
    pub(crate) fn because(mut self, error: Self) -> Self {
        self.0.because = Some(error);
        self
    }

    /// Says what to do about it, or one thing more.
    pub(crate) fn with_remedy(mut self, remedy: impl Into<Cow<'static, str>>) -> Self {
        let remedy = remedy.into();
        self.0.remedy = Some(match self.0.remedy.take() {
            None => remedy,
            Some(first) => format!("{first}; {remedy}").into(),
        });
        self
    }

    /// Adds what ENOTTY says of a file that was to be an iommufd.
    pub(crate) fn of_iommufd(self) -> Self {
        match &self.0.cause {
            Cause::Call(call) if call.errno == libc::ENOTTY => {
                self.with_remedy("the file is no /dev/iommu, or its kernel lacks the call")
            }
            _ => self,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(object) = &self.0.object {
            write!(f, "{object}: ")?;
        }
        f.write_str(&self.0.what)?;
        self.0.cause.go_on(f)?;
        if let Some(because) = &self.0.because {
            f.write_str(": ")?;
            fmt::Display::fmt(because, f)?;
        }
        match &self.0.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            object,
            what,
            cause,
            because,
            remedy,
        } = &*self.0;
        f.debug_struct("Error")
            .field("object", object)
            .field("what", what)
            .field("cause", cause)
            .field("because", because)
            .field("remedy", remedy)
            .finish()
    }
}

// Its sentence has all that led to it, so there is no `source` to print once more.
impl std::error::Error for Error {}

/// Says what was being done when a system call failed.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for std::result::Result<T, CallError> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|call| Error::new(Cause::Call(call), what()))
    }
}

/// As the functions of [`Error`], of a result.
pub(crate) trait Of {
    fn of(self, object: &str) -> Self;
}

impl<T> Of for Result<T> {
    fn of(self, object: &str) -> Self {
        self.map_err(|error| error.of(object))
    }
}

/// By the positive errno: see [`Error::hypercall_result`].
pub(crate) fn hypercall_result(errno: i32, can_retry: bool) -> u64 {
    match errno {
        0 => 0,
        libc::EAGAIN | libc::ENOMEM if can_retry => libc::EAGAIN as u64,
        _ => libc::EINVAL as u64,
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
