// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's storage daemon: a process that serves a disk to a guest, whose memory it maps by descriptor (vhost-user-blk).

use super::cgroup::Cgroup;
use crate::failure::{Attempt, Failure};
use crate::place;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const DAEMON: &str = "qemu-storage-daemon";
const START_PATIENCE: Duration = Duration::from_secs(60);
/// So slow that a request is in flight for as long as a guest needs to turn its memory private, once there was one before.
pub const BYTES_PER_SECOND: u64 = 1 << 20;

/// One that serves a disk, until it is dropped.
pub struct StorageDaemon {
    child: Child,
    directory: PathBuf,
}

impl StorageDaemon {
    /// Starts it on a disk of that many bytes, which it makes if there is none, and waits until it listens.
    pub fn start(directory: &Path, bytes: u64) -> Result<Self, Failure> {
        let disk = directory.join("disk.img");
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&disk)
            .and_then(|file| file.set_len(bytes))
            .attempt(|| format!("making {}", disk.display()))?;
        let socket = socket(directory);
        let _ = fs::remove_file(&socket);
        let log = directory.join("storage-daemon.stderr");
        let log = File::create(&log).attempt(|| format!("creating {}", log.display()))?;
        let mut command = place::program(DAEMON);
        command
            .arg("--object")
            .arg(format!(
                "throttle-group,id=slow,limits.bps-total={BYTES_PER_SECOND}"
            ))
            .arg("--blockdev")
            .arg(format!("file,node-name=file,filename={}", disk.display()))
            .arg("--blockdev")
            .arg("throttle,node-name=disk,throttle-group=slow,file=file")
            .arg("--export")
            .arg(format!(
                "vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
                socket.display()
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        println!("agent: {command:?}");
        let child = command.spawn().attempt(|| format!("starting {DAEMON}"))?;
        let mut daemon = Self {
            child,
            directory: directory.to_path_buf(),
        };
        let deadline = Instant::now() + START_PATIENCE;
        while !socket.exists() {
            if let Some(status) = daemon.ended()? {
                return Err(Failure::new(format!(
                    "the storage daemon ended with {status}: {}",
                    daemon.complaints()
                )));
            }
            if Instant::now() > deadline {
                return Err(Failure::new("the storage daemon does not listen"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Puts it into a group, with what it does from now on.
    pub fn enter(&self, group: &Cgroup) -> Result<(), Failure> {
        group.take_in(self.pid())
    }

    /// What serves, for `-chardev`.
    pub fn chardev(&self) -> String {
        let socket = socket(&self.directory);
        format!("socket,id=disk0,path={},reconnect-ms=100", socket.display())
    }

    /// The disk's bytes, as they are now.
    pub fn disk(&self) -> Result<File, Failure> {
        let path = self.directory.join("disk.img");
        File::options()
            .read(true)
            .write(true)
            .open(&path)
            .attempt(|| format!("opening {}", path.display()))
    }

    /// Kills it, in the middle of whatever it is doing.
    pub fn kill(&mut self) -> Result<(), Failure> {
        self.child
            .kill()
            .and_then(|()| self.child.wait())
            .map(drop)
            .attempt(|| "killing the storage daemon".into())
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, Failure> {
        self.child
            .try_wait()
            .attempt(|| "waiting for the storage daemon".into())
    }

    /// What it has complained about.
    pub fn complaints(&self) -> String {
        fs::read_to_string(self.directory.join("storage-daemon.stderr")).unwrap_or_default()
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("disk.sock")
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
