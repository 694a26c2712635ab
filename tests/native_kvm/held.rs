// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages that somebody else holds when they are to become private, in place.

use crate::common::skipped;
use crate::guest::Guest;
use crate::kvm::Machine;
use crate::name_of;
use gmem::{Attribute, Block, BlockConfig};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use Attribute::{Private, Shared};

const PAGE: u64 = 4096;
const SIZE: u64 = 2 << 20;
const DATA: u64 = 0x8000;

/// An io_uring ring.
pub struct Ring(OwnedFd);

impl Ring {
    pub fn new() -> io::Result<Self> {
        // `struct io_uring_params`, all of it for the kernel to choose.
        let mut parameters = [0u64; 15];
        // SAFETY: as many bytes as the kernel reads and writes.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
        match fd {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: the kernel just gave this number to us.
            fd => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) })),
        }
    }

    /// Pins memory of this process; the errno if that can't be.
    pub fn register(&self, host: *mut u8, size: u64) -> Result<(), i32> {
        const REGISTER_BUFFERS: libc::c_uint = 0;
        let buffer = libc::iovec {
            iov_base: host.cast(),
            iov_len: size as usize,
        };
        // SAFETY: one buffer, to which the kernel only refers.
        let result = unsafe {
            let ring = self.0.as_raw_fd();
            libc::syscall(
                libc::SYS_io_uring_register,
                ring,
                REGISTER_BUFFERS,
                &buffer,
                1,
            )
        };
        match result {
            -1 => Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)),
            _ => Ok(()),
        }
    }
}

fn guest(test: &str) -> Option<Guest> {
    let machine = Machine::in_place(test)?;
    let config = BlockConfig::confidential("ram", SIZE, Shared);
    let block = Block::new(&machine.vm, &config).unwrap();
    Some(Guest::on(machine, block))
}

#[test]
fn a_ring_that_holds_a_page_is_named() {
    let test = name_of(a_ring_that_holds_a_page_is_named);
    let Some(guest) = guest(test) else {
        return;
    };
    let ring = match Ring::new() {
        Ok(ring) => ring,
        Err(error) => return skipped(test, format_args!("io_uring: {error}")),
    };
    guest.stores(DATA, 0x1111);
    let held = guest.block.host().wrapping_add(DATA as usize);
    ring.register(held, PAGE).unwrap();
    let vm = &guest.machine.vm;
    let error = vm.convert(DATA - PAGE, 4 * PAGE, Private).unwrap_err();
    assert_eq!(error.errno(), libc::EAGAIN);
    let text = error.to_string();
    let fd = ring.0.as_raw_fd();
    let named = format!("at offset 0x8000 (held by io_uring ring fd {fd}, registered buffer 0)");
    assert!(text.contains(&named), "{text}");
    assert!(!guest.block.attributes_private(DATA - PAGE));
    assert_eq!(guest.loads(DATA), 0x1111);
    // It lets go a while after it is closed, which the library waits for.
    drop(ring);
    vm.convert(DATA - PAGE, 4 * PAGE, Private).unwrap();
    assert!(guest.block.attributes_private(DATA));
}

#[test]
fn a_pipe_that_holds_a_page_is_not_found_and_that_is_said() {
    let test = name_of(a_pipe_that_holds_a_page_is_not_found_and_that_is_said);
    let Some(guest) = guest(test) else {
        return;
    };
    guest.stores(DATA, 0x1111);
    let page = libc::iovec {
        iov_base: guest.block.host().wrapping_add(DATA as usize).cast(),
        iov_len: PAGE as usize,
    };
    let mut ends = [0; 2];
    // SAFETY: two numbers; then a page of the block's mapping, to which the pipe refers.
    let spliced = unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        libc::vmsplice(ends[1], &page, 1, 0)
    };
    assert_eq!(spliced, PAGE as isize);
    // SAFETY: the kernel just gave these numbers to us.
    let ends = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
    let vm = &guest.machine.vm;
    let error = vm.convert(DATA, PAGE, Private).unwrap_err();
    assert_eq!(error.errno(), libc::EAGAIN);
    let text = error.to_string();
    assert!(text.contains("no holder found in this process"), "{text}");
    drop(ends);
    vm.convert(DATA, PAGE, Private).unwrap();
}

/// What the library has for a page's attribute.
trait IsPrivate {
    fn attributes_private(&self, offset: u64) -> bool;
}

impl IsPrivate for Block {
    fn attributes_private(&self, offset: u64) -> bool {
        self.run_at(offset).unwrap().0 == Private
    }
}
