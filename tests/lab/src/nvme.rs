// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disk behind L0's NVMe controller: filled here, read and written by L2 through a passed-through controller, checked here.

use crate::cache::hex;
use crate::report::Outcome;
use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SIZE: u64 = 64 << 20;
const CHUNK: usize = 16 << 20;
/// L2 writes what it read with every byte changed, so that a stale or misdirected buffer can't pass.
const MASK: u8 = 0xa5;

pub struct Disk {
    path: PathBuf,
    /// What L2 must read.
    contents: Vec<u8>,
}

impl Disk {
    /// A fresh image: random where L2 reads, zero where it writes.
    pub fn create(path: &Path) -> Result<Disk> {
        let mut contents = vec![0u8; CHUNK];
        File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut contents))
            .context("can't get random bytes")?;
        let write = || -> std::io::Result<()> {
            let file = File::create(path)?;
            file.set_len(SIZE)?;
            file.write_all_at(&contents, 0)
        };
        write().with_context(|| format!("can't write {}", path.display()))?;
        Ok(Disk {
            path: path.to_path_buf(),
            contents,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Holds what L2 says it read and what it wrote against the image.
    pub fn verify(&self, outcome: &mut Outcome) -> Result<()> {
        let expected = hex(&Sha256::digest(&self.contents));
        let told = outcome.facts.get("read_sha256").cloned();
        let mut written = vec![0u8; CHUNK];
        File::open(&self.path)
            .and_then(|file| file.read_exact_at(&mut written, CHUNK as u64))
            .with_context(|| format!("can't read {}", self.path.display()))?;
        let wrong = written
            .iter()
            .zip(&self.contents)
            .position(|(found, source)| *found != source ^ MASK);
        outcome
            .facts
            .insert("l0_read_sha256".into(), json!(expected));
        outcome
            .facts
            .insert("l0_write_verified".into(), json!(wrong.is_none()));
        match told.as_ref().and_then(|value| value.as_str()) {
            Some(digest) if digest == expected => (),
            Some(_) => outcome.fail("L2 read other bytes than L0 had put on the disk".into()),
            None => outcome.fail("L2 did not report what it read from the disk".into()),
        }
        if let Some(offset) = wrong {
            outcome.fail(format!(
                "what L2 wrote did not reach L0's disk: byte {offset} of {CHUNK} is the first that differs"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Map;

    fn outcome(digest: &str) -> Outcome {
        Outcome {
            name: "x".into(),
            ok: true,
            seconds: 0.0,
            facts: Map::from_iter([("read_sha256".to_string(), json!(digest))]),
            error: None,
            console: None,
        }
    }

    #[test]
    fn only_the_right_bytes_pass() {
        let path = std::env::temp_dir().join(format!("gmem-lab-disk-{}", std::process::id()));
        let disk = Disk::create(&path).unwrap();
        let digest = hex(&Sha256::digest(&disk.contents));

        let mut untouched = outcome(&digest);
        disk.verify(&mut untouched).unwrap();
        assert!(!untouched.ok);
        assert_eq!(untouched.facts["l0_write_verified"], false);

        let mut masked: Vec<u8> = disk.contents.iter().map(|byte| byte ^ MASK).collect();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&masked, CHUNK as u64).unwrap();
        let mut good = outcome(&digest);
        disk.verify(&mut good).unwrap();
        assert!(good.ok, "{:?}", good.error);

        let mut liar = outcome("00");
        disk.verify(&mut liar).unwrap();
        assert!(!liar.ok);

        masked[CHUNK - 1] ^= 1;
        file.write_all_at(&masked, CHUNK as u64).unwrap();
        let mut late = outcome(&digest);
        disk.verify(&mut late).unwrap();
        assert!(!late.ok);
        std::fs::remove_file(&path).unwrap();
    }
}
