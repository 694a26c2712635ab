// SPDX-License-Identifier: MIT OR Apache-2.0
//! A QEMU process: started with a monitor and a serial line on sockets, its complaints kept in a file, ended by its pid.

use crate::failure::{Attempt, Failure};
use crate::lines::Lines;
use crate::place;
use crate::qmp::Qmp;
use serde_json::json;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";

/// linux/capability.h.
const CAP_IPC_LOCK: libc::c_ulong = 14;

/// What QEMU gets besides its arguments, and what it is denied.
#[derive(Clone, Copy, Default)]
pub struct Surroundings<'a> {
    /// More variables in its environment.
    pub variables: &'a [(&'a str, &'a OsStr)],
    /// Descriptors of ours that it keeps, under the same numbers.
    pub inherited: &'a [RawFd],
    /// Without the right to lock memory beyond its limit, which then counts; it is unlimited at first.
    pub limited: bool,
}

/// A guest under way.
pub struct Machine {
    pub qmp: Qmp,
    child: Child,
    stderr: PathBuf,
}

impl Machine {
    /// Starts QEMU with these arguments, added to what every guest of the lab has. Returns the machine and its COM1.
    ///
    /// The sockets exist before the process does: nothing the guest says can be lost, and no path has to be waited for.
    pub fn start(directory: &Path, arguments: &[&str]) -> Result<(Self, Lines), Failure> {
        Self::start_in(directory, arguments, Surroundings::default())
    }

    /// As `start`, in surroundings of the caller's choice.
    pub fn start_in(
        directory: &Path,
        arguments: &[&str],
        surroundings: Surroundings,
    ) -> Result<(Self, Lines), Failure> {
        fs::create_dir_all(directory).attempt(|| format!("creating {}", directory.display()))?;
        let (monitor, monitor_far) =
            UnixStream::pair().attempt(|| "making a socket pair".into())?;
        let (serial, serial_far) = UnixStream::pair().attempt(|| "making a socket pair".into())?;
        let stderr = directory.join("qemu.stderr");
        let stderr_file =
            File::create(&stderr).attempt(|| format!("creating {}", stderr.display()))?;
        let kept = [monitor_far.as_raw_fd(), serial_far.as_raw_fd()];

        let mut command = place::program(QEMU);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-L", place::share(), "-cpu", place::cpu()])
            .args(["-chardev", &format!("socket,id=monitor,fd={}", kept[0])])
            .args(["-object", "monitor-qmp,id=qmp,chardev=monitor"])
            .args(["-chardev", &format!("socket,id=serial,fd={}", kept[1])])
            .args(["-serial", "chardev:serial"])
            .args(arguments)
            .envs(surroundings.variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr_file);
        println!("agent: {command:?}");
        let mut inherited = surroundings.inherited.to_vec();
        inherited.extend(kept);
        let limited = surroundings.limited;
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe { command.pre_exec(move || prepare(&inherited, limited)) };
        let child = command.spawn().attempt(|| format!("starting {QEMU}"))?;
        drop((monitor_far, serial_far));

        let serial = Lines::new(
            "the guest's serial line",
            serial,
            &directory.join("serial.log"),
        )?;
        let monitor = Lines::new("QEMU's monitor", monitor, &directory.join("qmp.log"))?;
        // Before the greeting, so that a QEMU that dies at once is reaped as well.
        let mut starting = Starting(Some(child));
        let qmp = Qmp::new(monitor)?;
        let child = starting.0.take().expect("the child was put there above");
        Ok((Self { qmp, child, stderr }, serial))
    }

    /// Starts QEMU with arguments that it is to refuse; what it said last.
    pub fn refusal(directory: &Path, arguments: &[&str]) -> Result<String, Failure> {
        if let Ok((machine, _)) = Self::start(directory, arguments) {
            return Err(Failure::new(format!(
                "QEMU started where it was to refuse: {}",
                machine.complaints()
            )));
        }
        let path = directory.join("qemu.stderr");
        let text = fs::read_to_string(&path).attempt(|| format!("reading {}", path.display()))?;
        // A signal leaves nothing, or a line that is no refusal. The accelerator's own line comes after the reason.
        text.lines()
            .rfind(|line| {
                line.starts_with("qemu-system-x86_64: ")
                    && !line.contains("failed to initialize kvm")
            })
            .map(String::from)
            .attempt(|| format!("QEMU ended and said no reason: {text}"))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Changes how many bytes it may lock from now on.
    pub fn limit_locked(&self, bytes: u64) -> Result<(), Failure> {
        let limit = libc::rlimit {
            rlim_cur: bytes,
            rlim_max: libc::RLIM_INFINITY,
        };
        // SAFETY: the structure outlives the call; no old limits are asked for.
        let result = unsafe {
            libc::prlimit(
                self.pid() as libc::pid_t,
                libc::RLIMIT_MEMLOCK,
                &limit,
                std::ptr::null_mut(),
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()).attempt(|| "limiting QEMU's locked memory".into()),
        }
    }

    /// From now on it gets no file descriptor beyond those that it has. Not fewer than that: poll(2) refuses
    /// more than the limit.
    pub fn limit_files(&self) -> Result<(), Failure> {
        let directory = format!("/proc/{}/fd", self.pid());
        let there = |number: &u64| Path::new(&format!("{directory}/{number}")).is_symlink();
        let first_free = (0..).find(|number| !there(number)).unwrap_or(0);
        let limit = libc::rlimit {
            rlim_cur: first_free,
            rlim_max: first_free,
        };
        // SAFETY: the structure outlives the call; no old limits are asked for.
        let result = unsafe {
            libc::prlimit(
                self.pid() as libc::pid_t,
                libc::RLIMIT_NOFILE,
                &limit,
                std::ptr::null_mut(),
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()).attempt(|| "limiting QEMU's descriptors".into()),
        }
    }

    /// The kernel's ids of the vCPUs' threads.
    pub fn vcpus(&mut self) -> Result<Vec<u32>, Failure> {
        let answer = self.qmp.execute("query-cpus-fast", json!({}))?;
        let threads = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        threads
            .iter()
            .map(|vcpu| vcpu["thread-id"].as_u64().map(|id| id as u32))
            .collect::<Option<_>>()
            .attempt(|| format!("query-cpus-fast names no threads: {answer}"))
    }

    /// Everything QEMU has complained about so far.
    pub fn complaints(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Ends the scenario if QEMU has said anything yet: a good start has nothing to tell. What VFIO says of each device that
    /// is passed through here (its BARs, its reset) is the same on every kind of memory.
    pub fn is_silent(&self) -> Result<(), Failure> {
        const OF_VFIO: [&str; 4] = ["VFIO", "vfio", "PCI BAR?", "PCI peer-to-peer"];
        let complaints = self.complaints();
        let of_vfio =
            |line: &str| !line.contains("gmem") && OF_VFIO.iter().any(|part| line.contains(part));
        match complaints.lines().find(|line| !of_vfio(line)) {
            None => Ok(()),
            Some(said) => Err(Failure::new(format!(
                "QEMU has something to say at a good start: {said}"
            ))),
        }
    }

    /// Waits for QEMU to end by itself, with success.
    pub fn wait_for_exit(&mut self, patience: Duration) -> Result<(), Failure> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.exited()? {
                return match status.success() {
                    true => Ok(()),
                    false => Err(Failure::new(format!("QEMU ended with {status}"))),
                };
            }
            thread::sleep(Duration::from_millis(20));
        }
        Err(Failure::new("QEMU did not end in time"))
    }

    /// Kills it, as the kernel would for want of memory: nothing of it runs any more.
    pub fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill().attempt(|| "killing QEMU".into())
    }

    /// Whether QEMU has ended, and how.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>, Failure> {
        self.child.try_wait().attempt(|| "waiting for QEMU".into())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

struct Starting(Option<Child>);

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

/// Kills what is still there. Harmless after it has been waited for: std remembers that.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// In the child: the limit on locked memory becomes the highest that there may be.
fn lock_what_is_allowed() -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure outlives both calls.
    let result = unsafe {
        libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit)
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// In the child: keeps descriptors open over exec and lifts the limit on locked memory, against which iommufd counts the
/// pages that a device can reach, unless whoever runs QEMU may lock what they like.
fn prepare(kept: &[RawFd], limited: bool) -> io::Result<()> {
    for fd in kept {
        // SAFETY: plain fcntl on a descriptor that the parent keeps open until after the spawn.
        if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let unlimited = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // On a host nothing outlives who started it; in the lab the end of the machine is the end of all.
    // SAFETY: numbers only.
    if !place::is_lab() && unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the structure outlives the call.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &unlimited) } != 0 {
        // Root in a container may have been denied that; then whoever locks more than the limit says so.
        match place::is_lab() {
            true => return Err(io::Error::last_os_error()),
            false => lock_what_is_allowed()?,
        }
    }
    // SAFETY: numbers only. exec gives root every capability that is left in the bounding set.
    if limited && unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
