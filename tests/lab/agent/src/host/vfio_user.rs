// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vfio-user server that gets no further than agreeing on a version: enough for a client that refuses after that.

use crate::failure::{Attempt, Failure};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

/// Message id, command, size of all of it, flags, errno.
const HEADER_BYTES: usize = 16;
/// A header, major and minor version; capabilities would follow.
const VERSION_BYTES: usize = HEADER_BYTES + 4;
const COMMAND_VERSION: u16 = 1;
const FLAGS: std::ops::Range<usize> = 8..12;
const REPLY: u32 = 1;

/// One that serves each client that comes, one after the other, until it is dropped.
pub struct VfioUser {
    socket: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl VfioUser {
    pub fn start(directory: &Path) -> Result<Self, Failure> {
        let socket = directory.join("vfio-user.sock");
        let listener =
            UnixListener::bind(&socket).attempt(|| format!("listening at {}", socket.display()))?;
        let thread = thread::spawn(move || {
            for client in listener.incoming() {
                // The one that `drop` makes says nothing.
                match client.and_then(serve) {
                    Ok(true) => {}
                    Ok(false) | Err(_) => return,
                }
            }
        });
        Ok(Self {
            socket,
            thread: Some(thread),
        })
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for VfioUser {
    fn drop(&mut self) {
        // Whether it is still there to be woken or not: it ends.
        let _ = UnixStream::connect(&self.socket);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Answers the first message, and takes whatever comes after it until the client is gone. Whether there was one.
fn serve(mut client: UnixStream) -> io::Result<bool> {
    let mut message = vec![0; HEADER_BYTES];
    if let Err(error) = client.read_exact(&mut message) {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => Ok(false),
            _ => Err(error),
        };
    }
    let word = |at: usize| u16::from_le_bytes([message[at], message[at + 1]]);
    let size = u32::from_le_bytes([message[4], message[5], message[6], message[7]]) as usize;
    if word(2) != COMMAND_VERSION || size < VERSION_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    message.resize(size, 0);
    client.read_exact(&mut message[HEADER_BYTES..])?;
    message.truncate(VERSION_BYTES);
    message[4..8].copy_from_slice(&(VERSION_BYTES as u32).to_le_bytes());
    message[FLAGS].copy_from_slice(&REPLY.to_le_bytes());
    client.write_all(&message)?;
    io::copy(&mut client, &mut io::sink())?;
    Ok(true)
}
