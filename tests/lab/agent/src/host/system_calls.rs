// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls in another process's name, as a debugger makes them: KVM takes those for a VM from its own process only.

use crate::failure::{Attempt, Failure};
use std::io;
use std::mem;
use std::thread::sleep;
use std::time::Duration;

/// `syscall`.
const INSTRUCTION: u16 = 0x050f;
/// Below the stack pointer, beyond the red zone.
const SCRATCH_BELOW: u64 = 1024;
/// In `user_regs_struct`: not in a system call.
const NONE: u64 = u64::MAX;
/// linux/errno.h: ERESTARTSYS to ERESTART_RESTARTBLOCK, which no program sees.
const RESTARTS: std::ops::RangeInclusive<i64> = -516..=-512;

/// Has a thread that waits in a system call make another one, with the address of a copy of `structure` as its last
/// argument; what it returned.
pub fn in_the_name_of(
    thread: u32,
    number: i64,
    arguments: &[u64],
    structure: &[u64],
) -> Result<i64, Failure> {
    let what = || format!("a system call in the name of thread {thread}");
    let thread = thread as libc::pid_t;
    for _ in 0..200 {
        let traced = Traced::new(thread).attempt(what)?;
        if traced.waits().attempt(what)? {
            return traced.call(number, arguments, structure).attempt(what);
        }
        drop(traced);
        sleep(Duration::from_millis(20));
    }
    Err(Failure::new(format!("{}: it never waits in one", what())))
}

/// A thread that stands still, and goes on when this is dropped.
struct Traced(libc::pid_t);

impl Traced {
    fn new(thread: libc::pid_t) -> io::Result<Self> {
        let options = libc::PTRACE_O_TRACESYSGOOD as u64;
        ptrace(libc::PTRACE_SEIZE, thread, 0, options)?;
        let traced = Self(thread);
        ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0)?;
        traced.wait()?;
        Ok(traced)
    }

    fn wait(&self) -> io::Result<()> {
        let mut status = 0;
        // SAFETY: the status outlives the call.
        match unsafe { libc::waitpid(self.0, &mut status, libc::__WALL) } {
            -1 => Err(io::Error::last_os_error()),
            _ if libc::WIFSTOPPED(status) => Ok(()),
            _ => Err(io::Error::other("the thread has ended")),
        }
    }

    fn registers(&self) -> io::Result<libc::user_regs_struct> {
        // SAFETY: plain numbers, for which zero is fine.
        let mut registers: libc::user_regs_struct = unsafe { mem::zeroed() };
        let place = &raw mut registers as u64;
        ptrace(libc::PTRACE_GETREGS, self.0, 0, place).map(|_| registers)
    }

    fn set(&self, registers: &libc::user_regs_struct) -> io::Result<()> {
        let place = &raw const *registers as u64;
        ptrace(libc::PTRACE_SETREGS, self.0, 0, place).map(|_| ())
    }

    /// Whether it was in a system call that starts again when it goes on.
    fn waits(&self) -> io::Result<bool> {
        let registers = self.registers()?;
        if registers.orig_rax == NONE || !RESTARTS.contains(&(registers.rax as i64)) {
            return Ok(false);
        }
        let code = ptrace(libc::PTRACE_PEEKTEXT, self.0, registers.rip - 2, 0)?;
        Ok(code as u16 == INSTRUCTION)
    }

    fn call(&self, number: i64, arguments: &[u64], structure: &[u64]) -> io::Result<i64> {
        let mut before = self.registers()?;
        let place = (before.rsp - SCRATCH_BELOW) & !15;
        for (word, value) in structure.iter().enumerate() {
            ptrace(
                libc::PTRACE_POKEDATA,
                self.0,
                place + 8 * word as u64,
                *value,
            )?;
        }
        let mut registers = before;
        registers.rip -= 2;
        registers.rax = number as u64;
        registers.orig_rax = NONE;
        let mut all = arguments.to_vec();
        all.push(place);
        let slots = [
            &mut registers.rdi,
            &mut registers.rsi,
            &mut registers.rdx,
            &mut registers.r10,
        ];
        for (slot, value) in slots.into_iter().zip(all) {
            *slot = value;
        }
        self.set(&registers)?;
        // To its entry, and to its end.
        for _ in 0..2 {
            ptrace(libc::PTRACE_SYSCALL, self.0, 0, 0)?;
            self.wait()?;
        }
        let result = self.registers()?.rax as i64;
        // Nobody restarts the one that was interrupted but we.
        before.rip -= 2;
        before.rax = before.orig_rax;
        before.orig_rax = NONE;
        self.set(&before)?;
        Ok(result)
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let _ = ptrace(libc::PTRACE_DETACH, self.0, 0, 0);
    }
}

fn ptrace(
    request: libc::c_uint,
    thread: libc::pid_t,
    address: u64,
    data: u64,
) -> io::Result<libc::c_long> {
    // SAFETY: the thread's registers and memory are the callers' business, who pass places of the right size; -1 may be
    // what PEEKTEXT read, so that errno decides.
    unsafe {
        *libc::__errno_location() = 0;
        let result = libc::ptrace(request, thread, address, data);
        match (result, *libc::__errno_location()) {
            (-1, errno) if errno != 0 => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(result),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::in_the_name_of;
    use std::process::{Command, Stdio};
    use std::thread::sleep;
    use std::time::Duration;

    #[test]
    fn another_process_makes_a_call_and_goes_on_waiting() {
        // cat waits in read(2), whatever it is told to do meanwhile.
        let mut cat = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        sleep(Duration::from_millis(100));
        let answer = in_the_name_of(cat.id(), libc::SYS_getpid, &[], &[1, 2]);
        assert_eq!(answer.unwrap(), i64::from(cat.id()));
        assert_eq!(cat.try_wait().unwrap(), None);
        drop(cat.stdin.take());
        assert!(cat.wait().unwrap().success());
    }
}
