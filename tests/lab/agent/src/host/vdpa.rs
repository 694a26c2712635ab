// SPDX-License-Identifier: MIT OR Apache-2.0
//! Simulated vDPA devices of the kernel's, made over netlink as `vdpa dev add` makes them.

use crate::failure::{Attempt, Failure};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

// linux/netlink.h, linux/genetlink.h
const NETLINK_GENERIC: i32 = 16;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
// linux/vdpa.h
const VDPA_CMD_DEV_NEW: u8 = 3;
const VDPA_ATTR_MGMTDEV_DEV_NAME: u16 = 2;
const VDPA_ATTR_DEV_NAME: u16 = 4;

const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;

/// Makes a simulated disk, which the kernel keeps; the file for vhost.
pub fn disk() -> Result<String, Failure> {
    const FILE: &str = "/dev/vhost-vdpa-0";
    if Path::new(FILE).exists() {
        return Ok(FILE.into());
    }
    // SAFETY: no memory is passed.
    let fd = unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            NETLINK_GENERIC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error()).attempt(|| "making a netlink socket".into());
    }
    // SAFETY: the socket is new, and nobody else has it.
    let mut socket = unsafe { File::from_raw_fd(fd) };
    let name = [(CTRL_ATTR_FAMILY_NAME, "vdpa")];
    let family = ask(&mut socket, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 0, &name)
        .attempt(|| "looking for the kernel's vDPA".into())?;
    let family = attribute(&family, CTRL_ATTR_FAMILY_ID)
        .and_then(|value| Some(u16::from_ne_bytes(value.get(..2)?.try_into().ok()?)))
        .attempt(|| "the kernel names no number for its vDPA".into())?;
    let device = [
        (VDPA_ATTR_MGMTDEV_DEV_NAME, "vdpasim_blk"),
        (VDPA_ATTR_DEV_NAME, "disk0"),
    ];
    ask(&mut socket, family, VDPA_CMD_DEV_NEW, NLM_F_ACK, &device)
        .attempt(|| "making a vDPA device".into())?;
    let deadline = Instant::now() + PATIENCE;
    while !Path::new(FILE).exists() {
        if Instant::now() > deadline {
            let found: Vec<_> = fs::read_dir("/sys/bus/vdpa/devices")
                .attempt(|| "looking for vDPA devices".into())?
                .flatten()
                .map(|entry| entry.file_name())
                .collect();
            return Err(Failure::new(format!("{FILE} does not come; {found:?}")));
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(FILE.into())
}

/// Sends a command with strings for attributes; the attributes of the answer.
fn ask(
    socket: &mut File,
    family: u16,
    command: u8,
    flags: u16,
    strings: &[(u16, &str)],
) -> io::Result<Vec<u8>> {
    let mut body = vec![command, 1, 0, 0];
    for (kind, text) in strings {
        let length = 4 + text.len() + 1;
        body.extend((length as u16).to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(text.as_bytes());
        body.push(0);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend(family.to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    socket.write_all(&message)?;

    let mut answer = vec![0; 16 << 10];
    let length = socket.read(&mut answer)?;
    answer.truncate(length);
    let word = |at: usize| -> Option<[u8; 4]> { answer.get(at..at + 4)?.try_into().ok() };
    let short = || io::Error::new(io::ErrorKind::UnexpectedEof, "a netlink message is cut off");
    let kind = word(4).map(|word| u16::from_ne_bytes([word[0], word[1]]));
    if kind == Some(NLMSG_ERROR) {
        let error = i32::from_ne_bytes(word(HEADER).ok_or_else(short)?);
        return match error {
            0 => Ok(Vec::new()),
            _ => Err(io::Error::from_raw_os_error(-error)),
        };
    }
    let attributes = answer.get(HEADER + GENERIC_HEADER..).ok_or_else(short)?;
    Ok(attributes.to_vec())
}

/// The value of an attribute.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::attribute;

    #[test]
    fn attributes_are_padded() {
        let bytes = [7, 0, 2, 0, b'a', b'b', 0, 0, 6, 0, 1, 0, 0x1c, 0, 0, 0];
        assert_eq!(attribute(&bytes, 1), Some(&[0x1c, 0][..]));
        assert_eq!(attribute(&bytes, 2), Some(&b"ab\0"[..]));
        assert_eq!(attribute(&bytes, 3), None);
    }
}
