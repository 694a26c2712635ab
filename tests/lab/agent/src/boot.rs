// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an init has to do: mount, read the kernel command line, give a shell, power off.

use crate::failure::{Attempt, Failure};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// The kernel command line, as `name=value` words.
pub struct CommandLine(String);

impl CommandLine {
    /// Of a process that no kernel started as its first.
    pub fn empty() -> Self {
        Self(String::new())
    }

    pub fn read() -> Result<Self, Failure> {
        fs::read_to_string("/proc/cmdline")
            .map(Self)
            .attempt(|| "reading the kernel command line".into())
    }

    /// The last one wins, as with the kernel's own options.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.0
            .split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
            .filter(|(key, _)| *key == name)
            .map(|(_, value)| value)
            .next_back()
    }
}

/// Whether this is the first process of a machine whose kernel found nothing but our archive. A container's first process is on
/// somebody's files, and was not started as the kernel starts one.
pub fn is_init() -> bool {
    const RAMFS: i64 = 0x8584_58f6;
    const TMPFS: i64 = 0x0102_1994;
    let by_kernel = std::env::args_os()
        .next()
        .is_some_and(|name| name == "/init");
    if std::process::id() != 1 || !by_kernel {
        return false;
    }
    // SAFETY: a zeroed statfs is a valid one; both outlive the call.
    let kind = unsafe {
        let mut data: libc::statfs = std::mem::zeroed();
        match libc::statfs(c"/".as_ptr(), &mut data) {
            0 => data.f_type,
            _ => 0,
        }
    };
    [RAMFS, TMPFS].contains(&kind)
}

/// Mounts what every lab machine needs. Busy means the kernel has done it already (devtmpfs).
pub fn mount_all() -> Result<(), Failure> {
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
    ] {
        mount(kind, target).attempt(|| format!("mounting {target}"))?;
    }
    std::env::set_var("PATH", "/bin:/sbin:/usr/bin:/usr/sbin:/lab");
    Ok(())
}

/// Mounts what only a host looks at. A kernel without one of them can still run most scenarios, so it is only said.
pub fn prepare_host() -> Result<(), Failure> {
    for (kind, target) in [
        ("debugfs", "/sys/kernel/debug"),
        ("tracefs", "/sys/kernel/tracing"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("devpts", "/dev/pts"),
        ("tmpfs", "/dev/shm"),
    ] {
        if let Err(error) = mount(kind, target) {
            eprintln!("agent: no {kind} at {target}: {error}");
        }
    }
    Ok(())
}

fn mount(kind: &str, target: &str) -> io::Result<()> {
    if Path::new(target).symlink_metadata().is_err() {
        fs::create_dir_all(target)?;
    }
    let kind = CString::new(kind)?;
    let target = CString::new(target)?;
    // SAFETY: all pointers are NUL-terminated strings that outlive the call; a null data pointer means no options.
    let result = unsafe {
        libc::mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
            error => Err(error),
        },
    }
}

/// A shell on the console for as long as somebody uses it.
pub fn shell() -> Result<(), Failure> {
    println!("Lab shell. Leaving it (exit or ^D) powers this machine off.");
    let mut command = Command::new("/bin/busybox");
    command.arg("sh").arg("-l").env("HOME", "/root");
    let _ = fs::create_dir_all("/root");
    let _ = std::env::set_current_dir("/root");
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(|| {
            // A session of its own with the console as its terminal, so that ^C reaches the job and not init.
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 1);
            Ok(())
        });
    }
    command
        .status()
        .map(|_| ())
        .attempt(|| "starting the shell".into())
}

/// Ends the machine. Init must never return: the kernel would panic instead.
pub fn power_off() -> ! {
    // SAFETY: no memory is involved; sync makes what a passed-through disk was given reach it.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    loop {
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::CommandLine;

    #[test]
    fn the_last_word_of_a_name_wins() {
        let line = CommandLine("quiet lab.run=a lab.run=b,c console=ttyS0\n".into());
        assert_eq!(line.value("lab.run"), Some("b,c"));
        assert_eq!(line.value("console"), Some("ttyS0"));
        assert_eq!(line.value("quiet"), None);
    }
}
