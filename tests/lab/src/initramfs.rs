// SPDX-License-Identifier: MIT OR Apache-2.0
//! An initramfs as a list of files: the kernel's `newc` cpio, written here so that the host needs no tool for it.

use anyhow::{bail, Context, Result};
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

enum Node {
    Folder,
    File { mode: u32, bytes: Vec<u8> },
    Link(String),
    Device { major: u32, minor: u32 },
}

/// Paths are relative, without a leading slash. The same list gives the same bytes, whenever and wherever.
#[derive(Default)]
pub struct Archive {
    nodes: BTreeMap<String, Node>,
}

impl Archive {
    pub fn new() -> Archive {
        Archive::default()
    }

    /// Adds an empty folder and those above it.
    pub fn folder(&mut self, path: &str) {
        self.parents(path);
        self.nodes.entry(path.to_string()).or_insert(Node::Folder);
    }

    /// Adds a file with these permission bits.
    pub fn bytes(&mut self, path: &str, mode: u32, bytes: Vec<u8>) {
        self.parents(path);
        self.nodes
            .insert(path.to_string(), Node::File { mode, bytes });
    }

    /// Adds a copy of a host file, links followed.
    pub fn file(&mut self, path: &str, mode: u32, source: &Path) -> Result<()> {
        let bytes =
            std::fs::read(source).with_context(|| format!("can't read {}", source.display()))?;
        self.bytes(path, mode, bytes);
        Ok(())
    }

    pub fn link(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.nodes
            .insert(path.to_string(), Node::Link(target.to_string()));
    }

    /// Adds a character device; the kernel wants /dev/console before anything mounts devtmpfs.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents(path);
        self.nodes
            .insert(path.to_string(), Node::Device { major, minor });
    }

    fn parents(&mut self, path: &str) {
        for (end, _) in path.match_indices('/') {
            self.nodes
                .entry(path[..end].to_string())
                .or_insert(Node::Folder);
        }
    }

    /// Writes the archive. Sorted by path, so a folder comes before what is in it.
    pub fn write(&self, out: &mut impl Write) -> Result<()> {
        // Files with the same bytes and permissions have them in common, as links of one file do: L1's memory is what they are in.
        let mut firsts: HashMap<(u32, &[u8]), (u32, u32)> = HashMap::new();
        for (index, (_, node)) in self.nodes.iter().enumerate() {
            if let Node::File { mode, bytes } = node {
                let first = firsts
                    .entry((*mode, bytes))
                    .or_insert((index as u32 + 1, 0));
                first.1 += 1;
            }
        }
        for (index, (path, node)) in self.nodes.iter().enumerate() {
            if let Node::File { mode, bytes } = node {
                let (inode, links) = firsts[&(*mode, &bytes[..])];
                let is_first = inode == index as u32 + 1;
                let bytes = if is_first { &bytes[..] } else { &[] };
                entry(out, inode, 0o100_000 | mode, links, (0, 0), path, bytes)?;
                continue;
            }
            let (mode, bytes, device) = match node {
                Node::Folder => (0o040_755, &[][..], (0, 0)),
                Node::File { .. } => continue,
                Node::Link(target) => (0o120_777, target.as_bytes(), (0, 0)),
                Node::Device { major, minor } => (0o020_600, &[][..], (*major, *minor)),
            };
            let links = if matches!(node, Node::Folder) { 2 } else { 1 };
            entry(out, index as u32 + 1, mode, links, device, path, bytes)?;
        }
        entry(out, 0, 0, 1, (0, 0), "TRAILER!!!", &[])
    }
}

fn entry(
    out: &mut impl Write,
    inode: u32,
    mode: u32,
    links: u32,
    device: (u32, u32),
    path: &str,
    bytes: &[u8],
) -> Result<()> {
    let Ok(size) = u32::try_from(bytes.len()) else {
        bail!("{path} is too large for a cpio archive: 4 GiB is the limit");
    };
    let name_size = path.len() as u32 + 1;
    let fields = [
        inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0,
    ];
    let mut header = String::from("070701");
    for field in fields {
        header.push_str(&format!("{field:08X}"));
    }
    out.write_all(header.as_bytes())?;
    out.write_all(path.as_bytes())?;
    out.write_all(&[0])?;
    pad(out, header.len() + name_size as usize)?;
    out.write_all(bytes)?;
    pad(out, bytes.len())
}

/// Header and contents each end on a multiple of four.
fn pad(out: &mut impl Write, length: usize) -> Result<()> {
    Ok(out.write_all(&[0; 3][..length.wrapping_neg() % 4])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(archive: &Archive) -> Vec<u8> {
        let mut out = Vec::new();
        archive.write(&mut out).unwrap();
        out
    }

    /// Reads a newc archive back: (path, mode, contents).
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[6 + index * 8..14 + index * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name) = (field(1), field(6) as usize, field(11) as usize);
            let path = String::from_utf8(bytes[110..110 + name - 1].to_vec()).unwrap();
            let start = (110 + name).next_multiple_of(4);
            let contents = bytes[start..start + size].to_vec();
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            if path == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return found;
            }
            found.push((path, mode, contents));
        }
    }

    #[test]
    fn what_goes_in_comes_out() {
        let mut archive = Archive::new();
        archive.bytes("init", 0o755, b"12345".to_vec());
        archive.bytes("a/b/c", 0o644, vec![7; 4096]);
        archive.link("bin/sh", "busybox");
        archive.folder("proc");
        archive.device("dev/console", 5, 1);
        let entries = read(&written(&archive));
        let paths: Vec<&str> = entries.iter().map(|(path, ..)| path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "a",
                "a/b",
                "a/b/c",
                "bin",
                "bin/sh",
                "dev",
                "dev/console",
                "init",
                "proc"
            ]
        );
        assert_eq!(entries[0].1, 0o040_755);
        assert_eq!(entries[2], ("a/b/c".into(), 0o100_644, vec![7; 4096]));
        assert_eq!(
            entries[4],
            ("bin/sh".into(), 0o120_777, b"busybox".to_vec())
        );
        assert_eq!(entries[6].1, 0o020_600);
        assert_eq!(entries[7], ("init".into(), 0o100_755, b"12345".to_vec()));
    }

    #[test]
    fn what_is_the_same_is_there_once() {
        let mut archive = Archive::new();
        archive.bytes("a", 0o755, vec![7; 4096]);
        archive.bytes("b", 0o755, vec![7; 4096]);
        archive.bytes("d", 0o644, vec![7; 4096]);
        let bytes = written(&archive);
        let sizes: Vec<usize> = read(&bytes).iter().map(|entry| entry.2.len()).collect();
        assert_eq!(sizes, [4096, 0, 4096]);
        // Same inode, two links, and what comes later has no bytes of its own.
        let field = |text: &[u8], index: usize| {
            let word = std::str::from_utf8(&text[6 + index * 8..14 + index * 8]).unwrap();
            u32::from_str_radix(word, 16).unwrap()
        };
        let headers = bytes
            .windows(6)
            .enumerate()
            .filter(|(_, word)| word == b"070701");
        let linked: Vec<_> = headers
            .map(|(at, _)| (field(&bytes[at..], 0), field(&bytes[at..], 4)))
            .collect();
        assert_eq!(linked[..3], [(1, 2), (1, 2), (3, 1)]);
    }

    #[test]
    fn order_of_adding_does_not_show() {
        let mut one = Archive::new();
        one.bytes("x", 0o644, vec![1]);
        one.folder("y/z");
        let mut two = Archive::new();
        two.folder("y/z");
        two.bytes("x", 0o644, vec![1]);
        assert_eq!(written(&one), written(&two));
    }
}
