// SPDX-License-Identifier: MIT OR Apache-2.0
//! What outlives a run: products under a name that carries a hash of everything that went into them.
//!
//! A product is made in a temporary folder and renamed, so a name that exists is complete. Object folders of long builds
//! (`work/`) are kept beside them: a changed patch or option rebuilds what it touches and no more.

use crate::{interrupt, ui};
use anyhow::{bail, Context, Result};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Older products of a kind than these go when a new one is made.
const KEEP_PER_KIND: usize = 4;

/// Hashes what goes into a product. Each part has a name and a length, so parts can't run into each other.
pub struct Key {
    hash: Sha256,
}

impl Key {
    pub fn new(kind: &str) -> Key {
        let key = Key {
            hash: Sha256::new(),
        };
        key.bytes("kind", kind.as_bytes())
    }

    pub fn text(self, name: &str, value: &str) -> Key {
        self.bytes(name, value.as_bytes())
    }

    pub fn bytes(mut self, name: &str, value: &[u8]) -> Key {
        self.part(name.as_bytes());
        self.part(value);
        self
    }

    pub fn file(self, name: &str, path: &Path) -> Result<Key> {
        let digest = sha256_of(path)?;
        Ok(self.text(name, &digest))
    }

    fn part(&mut self, bytes: &[u8]) {
        self.hash.update((bytes.len() as u64).to_le_bytes());
        self.hash.update(bytes);
    }

    pub fn finish(self) -> String {
        hex(&self.hash.finalize())[..16].to_string()
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Lower-case hex of a file's SHA-256.
pub fn sha256_of(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("can't read {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let count = file
            .read(&mut buffer)
            .with_context(|| format!("can't read {}", path.display()))?;
        if count == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..count]);
    }
}

pub struct Cache {
    root: PathBuf,
}

/// Held while one run changes something that others use.
pub struct Lock {
    _file: File,
}

impl Cache {
    /// Opens, and creates if need be, the cache at `chosen` or in the user's cache folder.
    pub fn open(chosen: Option<&Path>) -> Result<Cache> {
        let root = match chosen {
            Some(path) => path.to_path_buf(),
            None => default_root()?,
        };
        std::fs::create_dir_all(&root).with_context(|| {
            format!(
                "can't create the cache folder {}; choose another with --cache DIR",
                root.display()
            )
        })?;
        let root = root.canonicalize()?;
        // make and configure scripts split words.
        let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
        if !root.to_str().is_some_and(|path| path.chars().all(plain)) {
            bail!(
                "the cache folder {} has a space or another character in its name that kernel and QEMU builds can't \
                 cope with; choose another with --cache DIR",
                root.display()
            );
        }
        for folder in ["downloads", "products", "sources", "work"] {
            std::fs::create_dir_all(root.join(folder))
                .with_context(|| format!("can't write to the cache folder {}", root.display()))?;
        }
        Ok(Cache { root })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn downloads(&self) -> PathBuf {
        self.root.join("downloads")
    }

    /// A folder for objects of an incremental build.
    pub fn work(&self, name: &str) -> PathBuf {
        self.root.join("work").join(name)
    }

    /// Waits until no other run prepares anything in this cache. Removes what a run that was killed left half-made.
    pub fn lock(&self) -> Result<Lock> {
        let lock = lock(
            &self.root.join("lock"),
            "another `cargo lab` prepares this cache",
        )?;
        for folder in ["products", "sources"] {
            let listing = std::fs::read_dir(self.root.join(folder));
            for entry in listing.into_iter().flatten().flatten() {
                let path = entry.path();
                let half_made = path
                    .extension()
                    .is_some_and(|extension| extension == "part" || extension == "gone");
                if half_made {
                    let _ = std::fs::remove_dir_all(path);
                }
            }
        }
        Ok(lock)
    }

    /// Where a product is or will be.
    pub fn product_path(&self, kind: &str, key: &str) -> PathBuf {
        self.root.join("products").join(format!("{kind}-{key}"))
    }

    /// A product that is there, marked as used.
    pub fn find(&self, kind: &str, key: &str) -> Option<PathBuf> {
        let path = self.product_path(kind, key);
        if !path.is_dir() {
            return None;
        }
        if let Ok(folder) = File::open(&path) {
            let _ = folder.set_modified(std::time::SystemTime::now());
        }
        Some(path)
    }

    /// A product by name, made by `make` in an empty folder if it is not there yet.
    pub fn product(
        &self,
        kind: &str,
        key: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        if let Some(path) = self.find(kind, key) {
            return Ok(path);
        }
        let path = self.product_path(kind, key);
        make_whole(&path, make)?;
        self.prune(kind, &path);
        Ok(path)
    }

    /// As `product`, under `sources/`, which are large: those of the same kind that went out of use go at once.
    pub fn source(
        &self,
        kind: &str,
        key: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let folder = self.root.join("sources");
        let path = folder.join(format!("{kind}-{key}"));
        if !path.is_dir() {
            make_whole(&path, make)?;
        }
        for (other, _) in entries(&folder, kind) {
            if other != path {
                remove_whole(&other);
            }
        }
        Ok(path)
    }

    fn prune(&self, kind: &str, newest: &Path) {
        let mut all = entries(&self.root.join("products"), kind);
        all.sort_by_key(|(_, used)| std::cmp::Reverse(*used));
        for (path, _) in all.into_iter().skip(KEEP_PER_KIND) {
            if path != newest {
                remove_whole(&path);
            }
        }
    }

    /// Says so now rather than hours later.
    pub fn require_space(&self, bytes: u64) -> Result<()> {
        let free = free_bytes(&self.root)?;
        if free < bytes {
            bail!(
                "{} has {} free and the lab needs about {} more; make room or choose another place with --cache DIR",
                self.root.display(),
                gib(free),
                gib(bytes)
            );
        }
        Ok(())
    }
}

/// Waits for a lock that goes when its holder ends, however that happens.
pub fn lock(path: &Path, holder: &str) -> Result<Lock> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("can't open {}", path.display()))?;
    let mut told = false;
    loop {
        // SAFETY: flock on a descriptor that is open.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(Lock { _file: file });
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::WouldBlock {
            return Err(error).with_context(|| format!("can't lock {}", path.display()));
        }
        if !told {
            ui::note(&format!("{holder}; waiting for it"));
            told = true;
        }
        std::thread::sleep(Duration::from_millis(200));
        interrupt::check()?;
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// `kind-<16 hex digits>` folders and when they were last used.
fn entries(folder: &Path, kind: &str) -> Vec<(PathBuf, std::time::SystemTime)> {
    let Ok(listing) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    listing
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_str()
                .and_then(|name| name.strip_prefix(kind)?.strip_prefix('-'))
                .is_some_and(|key| key.len() == 16 && key.bytes().all(|b| b.is_ascii_hexdigit()))
        })
        .filter_map(|entry| Some((entry.path(), entry.metadata().ok()?.modified().ok()?)))
        .collect()
}

/// Makes a folder that is either complete or absent.
fn make_whole(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = PathBuf::from(format!("{}.part", path.display()));
    if temporary.exists() {
        std::fs::remove_dir_all(&temporary)
            .with_context(|| format!("can't remove {}", temporary.display()))?;
    }
    std::fs::create_dir_all(&temporary)
        .with_context(|| format!("can't create {}", temporary.display()))?;
    match make(&temporary) {
        Ok(()) => std::fs::rename(&temporary, path)
            .with_context(|| format!("can't move {} into place", temporary.display())),
        Err(error) => {
            let _ = std::fs::remove_dir_all(&temporary);
            Err(error)
        }
    }
}

/// Removes a folder without ever leaving half of it under its name.
fn remove_whole(path: &Path) {
    let doomed = PathBuf::from(format!("{}.gone", path.display()));
    if std::fs::rename(path, &doomed).is_ok() {
        let _ = std::fs::remove_dir_all(doomed);
    }
}

fn default_root() -> Result<PathBuf> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base = absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .context(
            "neither XDG_CACHE_HOME nor HOME is set; say where to keep the cache with --cache DIR",
        )?;
    Ok(base.join("gmem-lab"))
}

fn free_bytes(path: &Path) -> Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a NUL-terminated path and a zeroed struct of the right type.
    let stat = unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        if libc::statvfs(name.as_ptr(), &mut stat) != 0 {
            return Err(std::io::Error::last_os_error())
                .with_context(|| format!("can't ask for the free space of {}", path.display()));
        }
        stat
    };
    Ok(stat.f_bavail * stat.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(name: &str) -> Cache {
        let path = std::env::temp_dir().join(format!("gmem-lab-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Cache::open(Some(&path)).unwrap()
    }

    #[test]
    fn a_key_tells_names_and_boundaries_apart() {
        let key = |name: &str, value: &str| Key::new("k").text(name, value).finish();
        assert_eq!(key("a", "b"), key("a", "b"));
        assert_ne!(key("a", "b"), key("ab", ""));
        assert_ne!(key("a", "b"), key("b", "a"));
        assert_ne!(
            Key::new("k").text("a", "bc").finish(),
            Key::new("k").text("a", "b").text("c", "").finish()
        );
        assert_ne!(Key::new("x").finish(), Key::new("y").finish());
    }

    #[test]
    fn a_product_that_failed_is_not_there() {
        let cache = cache("failed");
        let result = cache.product("thing", "0123456789abcdef", |path| {
            std::fs::write(path.join("half"), "x")?;
            bail!("no")
        });
        assert!(result.is_err());
        assert!(cache.find("thing", "0123456789abcdef").is_none());
        let left = cache.root().join("sources/thing-0123456789abcdef.part");
        std::fs::create_dir(&left).unwrap();
        let _lock = cache.lock().unwrap();
        assert!(!left.exists());
        std::fs::remove_dir_all(cache.root()).unwrap();
    }

    #[test]
    fn a_product_is_made_once_and_old_ones_go() {
        let cache = cache("once");
        let mut made = 0;
        for round in 0..2 {
            for index in 0..3u64 {
                cache
                    .product("thing", &format!("{index:016x}"), |path| {
                        made += 1;
                        Ok(std::fs::write(path.join("whole"), format!("{round}"))?)
                    })
                    .unwrap();
            }
        }
        assert_eq!(made, 3);
        for index in 3..9u64 {
            cache
                .product("thing", &format!("{index:016x}"), |_| Ok(()))
                .unwrap();
        }
        assert_eq!(
            entries(&cache.root().join("products"), "thing").len(),
            KEEP_PER_KIND
        );
        std::fs::remove_dir_all(cache.root()).unwrap();
    }

    #[test]
    fn a_hash_is_the_files() {
        let path = std::env::temp_dir().join(format!("gmem-lab-abc-{}", std::process::id()));
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(
            sha256_of(&path).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        std::fs::remove_file(&path).unwrap();
    }
}
