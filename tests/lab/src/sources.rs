// SPDX-License-Identifier: MIT OR Apache-2.0
//! Source trees of Linux and QEMU: from Debian's packages, or from where the user says.
//!
//! Debian's choice is made once per cache and written down, so that later runs need neither network nor a rebuild; removing
//! `sources/*.selected` asks again.

use crate::apt::{Apt, SourceFile, SourcePackage};
use crate::cache::{self, Cache, Key};
use crate::process::{self, Logs};
use crate::{interrupt, ui, version};
use anyhow::{anyhow, bail, Context, Result};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

pub const LINUX_SERIES: &str = "7.3";
pub const QEMU_SERIES: &str = "11.1";

/// A tree as it came, never written to after it is there.
pub struct Source {
    pub tree: PathBuf,
    pub key: String,
    pub version: String,
}

/// Where trees come from. apt is opened on first need and used by one thread at a time.
pub struct Sources<'a> {
    pub cache: &'a Cache,
    pub logs: &'a Logs,
    apt: Mutex<Option<Apt>>,
}

/// An archive and its hash.
struct Selected {
    file: PathBuf,
    sha256: String,
}

/// Versions that have left Debian's index and are still in its pool.
fn known_qemu() -> Vec<SourcePackage> {
    vec![SourcePackage {
        version: "1:11.1.1+ds-1".into(),
        directory: "pool/main/q/qemu".into(),
        files: vec![SourceFile {
            name: "qemu_11.1.1+ds.orig.tar.xz".into(),
            sha256: "0b1376e75dbe3e2fea4e408f8669f88a723f419f36a5b7d74cc6a4cfe07e4f5e".into(),
        }],
    }]
}

impl<'a> Sources<'a> {
    pub fn new(cache: &'a Cache, logs: &'a Logs) -> Sources<'a> {
        Sources {
            cache,
            logs,
            apt: Mutex::new(None),
        }
    }

    /// Runs something that needs the mirror.
    pub fn with_apt<T>(&self, work: impl FnOnce(&Apt) -> Result<T>) -> Result<T> {
        let mut slot = self
            .apt
            .lock()
            .map_err(|_| anyhow!("another step failed"))?;
        let apt = match slot.take() {
            Some(apt) => apt,
            None => Apt::open(self.cache, self.logs)?,
        };
        let result = work(&apt);
        *slot = Some(apt);
        result
    }

    pub fn linux(&self, user: Option<&Path>) -> Result<Source> {
        let source = match user {
            Some(path) => self.users("linux", path, "--kernel-src")?,
            None => {
                let selected = self.selected("linux", || self.debian_linux())?;
                self.unpacked("linux", &selected)?
            }
        };
        let version = linux_version(&source.tree)?;
        require_series("Linux", &version, LINUX_SERIES, "--kernel-src")?;
        Ok(Source { version, ..source })
    }

    pub fn qemu(&self, user: Option<&Path>) -> Result<Source> {
        let source = match user {
            Some(path) => self.users("qemu", path, "--qemu-src")?,
            None => {
                let selected = self.selected("qemu", || self.debian_qemu())?;
                self.unpacked("qemu", &selected)?
            }
        };
        let file = source.tree.join("VERSION");
        let version = std::fs::read_to_string(&file)
            .with_context(|| format!("this is not a QEMU tree: {} is missing", file.display()))?
            .trim()
            .to_string();
        require_series("QEMU", &version, QEMU_SERIES, "--qemu-src")?;
        Ok(Source { version, ..source })
    }

    /// A binary package by name: the newest that the mirror serves, chosen once per cache. With its SHA-256.
    pub fn package(&self, name: &str) -> Result<(PathBuf, String)> {
        let selected = self.selected(name, || {
            let step = ui::step("firmware", &format!("fetching {name}"));
            let (version, path) = self.with_apt(|apt| apt.newest_package(name, |_| true))?;
            step.done(&format!("fetched {name} {version}"));
            Ok(path)
        })?;
        Ok((selected.file, selected.sha256))
    }

    fn debian_linux(&self) -> Result<PathBuf> {
        let step = ui::step("kernel", "fetching Linux sources (160 MB)");
        let package = format!("linux-source-{LINUX_SERIES}");
        let (version, path) = self.with_apt(|apt| {
            apt.newest_package(&package, |version| {
                in_series(version::upstream(version), LINUX_SERIES)
            })
        })?;
        step.done(&format!("fetched {package} {version}"));
        Ok(path)
    }

    fn debian_qemu(&self) -> Result<PathBuf> {
        let step = ui::step("qemu", "fetching QEMU sources (40 MB)");
        let (version, path) = self.with_apt(|apt| {
            let mut candidates = apt.sources("qemu")?;
            candidates.retain(|package| in_series(version::upstream(&package.version), QEMU_SERIES));
            for known in known_qemu() {
                if !candidates.iter().any(|package| package.version == known.version) {
                    candidates.push(known);
                }
            }
            let mut refusals: Vec<String> = Vec::new();
            for package in &candidates {
                // Two revisions of one version share the tarball: a refusal counts for both.
                let Some(file) = (package.files.iter())
                    .find(|file| file.name.contains(".orig.tar.") && !file.name.ends_with(".asc"))
                else {
                    continue;
                };
                if refusals.iter().any(|refusal| refusal.contains(&file.name)) {
                    continue;
                }
                match apt.file(&package.directory, file) {
                    Ok(path) => return Ok((package.version.clone(), path)),
                    Err(error) => {
                        interrupt::check()?;
                        refusals.push(error.to_string());
                    }
                }
            }
            bail!(
                "no QEMU {QEMU_SERIES}.x can be fetched; give a tree or tarball with --qemu-src PATH. What was tried:\n  {}",
                refusals.join("\n  ")
            )
        })?;
        step.done(&format!("fetched qemu {version}"));
        Ok(path)
    }

    /// The choice written down earlier, or a new one.
    fn selected(&self, kind: &str, choose: impl FnOnce() -> Result<PathBuf>) -> Result<Selected> {
        let note = self
            .cache
            .root()
            .join("sources")
            .join(format!("{kind}.selected"));
        if let Ok(text) = std::fs::read_to_string(&note) {
            let mut words = text.split_whitespace();
            if let (Some(sha256), Some(name)) = (words.next(), words.next()) {
                let selected = Selected {
                    file: self.cache.downloads().join(name),
                    sha256: sha256.to_string(),
                };
                let unpacked = (self.cache.root().join("sources"))
                    .join(format!("{kind}-{}", source_key(kind, &selected.sha256)));
                if unpacked.is_dir() || selected.file.is_file() {
                    return Ok(selected);
                }
            }
        }
        let file = choose()?;
        let sha256 = cache::sha256_of(&file)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        std::fs::write(&note, format!("{sha256} {name}\n"))?;
        Ok(Selected { file, sha256 })
    }

    fn unpacked(&self, kind: &str, selected: &Selected) -> Result<Source> {
        let key = source_key(kind, &selected.sha256);
        let tree = self.cache.source(kind, &key, |folder| {
            let step = ui::step(kind, "unpacking sources");
            self.unpack(kind, &selected.file, folder)?;
            step.done("sources unpacked");
            Ok(())
        })?;
        Ok(Source {
            tree,
            key,
            version: String::new(),
        })
    }

    fn users(&self, kind: &str, path: &Path, option: &str) -> Result<Source> {
        let path = path
            .canonicalize()
            .with_context(|| format!("{option} {}: can't find it", path.display()))?;
        if path.is_file() {
            let sha256 = cache::sha256_of(&path)?;
            return self.unpacked(kind, &Selected { file: path, sha256 });
        }
        require_tree(kind, &path, option)?;
        let key = Key::new(kind)
            .text("recipe", RECIPE)
            .text("folder", &listing(&path)?)
            .finish();
        let tree = self.cache.source(kind, &key, |folder| {
            let step = ui::step(kind, "copying sources");
            self.logs.run(
                &format!("{kind}-copy"),
                Command::new("sh")
                    .args([
                        "-c",
                        "tar -C \"$1\" --exclude=./.git -cf - . | tar -C \"$2\" -xf -",
                        "copy",
                    ])
                    .args([&path, &folder.to_path_buf()]),
            )?;
            self.adjust(kind, folder)?;
            step.done("sources copied");
            Ok(())
        })?;
        Ok(Source {
            tree,
            key,
            version: String::new(),
        })
    }

    fn unpack(&self, kind: &str, archive: &Path, folder: &Path) -> Result<()> {
        let log = format!("{kind}-unpack");
        let is_package = archive
            .extension()
            .is_some_and(|extension| extension == "deb");
        let script = if is_package {
            // linux-source is a package with one tarball in it.
            "dpkg-deb --fsys-tarfile \"$1\" | tar -xOf - --wildcards '*/linux-source-*.tar.xz' | \
             tar -C \"$2\" --strip-components=1 -xJf -"
        } else {
            "tar -C \"$2\" --strip-components=1 -xf \"$1\""
        };
        self.logs
            .run(
                &log,
                Command::new("sh")
                    .args(["-c", script, "unpack"])
                    .args([archive, folder]),
            )
            .with_context(|| format!("can't unpack {}", archive.display()))?;
        require_tree(kind, folder, &archive.display().to_string())?;
        self.adjust(kind, folder)
    }

    /// What every tree needs before it can be built out of tree.
    fn adjust(&self, kind: &str, tree: &Path) -> Result<()> {
        if kind == "qemu" {
            return leave_out_missing_blobs(tree);
        }
        if tree.join(".config").exists() || tree.join("include/config").exists() {
            self.logs.run(
                "linux-mrproper",
                Command::new("make").arg("-C").arg(tree).arg("mrproper"),
            )?;
        }
        Ok(())
    }
}

/// Said before a folder is copied that is something else altogether.
fn require_tree(kind: &str, path: &Path, option: &str) -> Result<()> {
    let (what, signs) = match kind {
        "qemu" => ("QEMU", ["VERSION", "meson_options.txt"]),
        _ => ("Linux", ["Makefile", "Kconfig"]),
    };
    match signs.iter().find(|sign| !path.join(sign).is_file()) {
        Some(sign) => bail!(
            "{option} {}: this is not a {what} tree, it has no {sign}",
            path.display()
        ),
        None => Ok(()),
    }
}

/// Changes when a tree is unpacked or adjusted in another way.
const RECIPE: &str = "1";

fn source_key(kind: &str, sha256: &str) -> String {
    Key::new(kind)
        .text("recipe", RECIPE)
        .text("archive", sha256)
        .finish()
}

/// Debian's `+ds` tarballs lack firmware blobs that pc-bios/meson.build wants to unpack or install. Firmware comes from
/// packages of its own here, so the build must not look for them.
fn leave_out_missing_blobs(tree: &Path) -> Result<()> {
    let path = tree.join("pc-bios/meson.build");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("this is not a QEMU tree: {} is missing", path.display()))?;
    let mut changed = text.clone();
    if !tree.join("pc-bios/edk2-aarch64-code.fd.bz2").exists() {
        changed = changed.replace(
            "\nif unpack_edk2_blobs\n",
            "\nif unpack_edk2_blobs and false\n",
        );
    }
    if !tree.join("pc-bios/dtb/bamboo.dtb").exists() {
        changed = changed.replace("\nsubdir('dtb')\n", "\n");
    }
    if changed != text {
        std::fs::write(&path, changed)?;
    }
    Ok(())
}

/// Names, sizes and times of all files: cheap, and changes when the user edits something.
fn listing(folder: &Path) -> Result<String> {
    let mut lines = Vec::new();
    let mut pending = vec![folder.to_path_buf()];
    while let Some(current) = pending.pop() {
        let entries = std::fs::read_dir(&current)
            .with_context(|| format!("can't read {}", current.display()))?;
        for entry in entries {
            let entry = entry?;
            if entry.file_name() == ".git" {
                continue;
            }
            let data = entry.metadata()?;
            let path = entry.path();
            if data.is_dir() {
                pending.push(path);
            } else {
                lines.push(format!(
                    "{} {} {}.{}",
                    path.strip_prefix(folder).unwrap_or(&path).display(),
                    data.len(),
                    data.mtime(),
                    data.mtime_nsec()
                ));
            }
        }
    }
    lines.sort();
    Ok(lines.join("\n"))
}

fn linux_version(tree: &Path) -> Result<String> {
    let path = tree.join("Makefile");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("this is not a Linux tree: {} is missing", path.display()))?;
    parse_linux_version(&text).context("this is not a Linux tree: its Makefile has no version")
}

fn parse_linux_version(makefile: &str) -> Option<String> {
    let field = |name: &str| {
        makefile.lines().find_map(|line| {
            let (left, right) = line.split_once('=')?;
            (left.trim() == name).then(|| right.trim().to_string())
        })
    };
    Some(format!(
        "{}.{}.{}",
        field("VERSION")?,
        field("PATCHLEVEL")?,
        field("SUBLEVEL")?
    ))
}

/// `11.1.1+ds` and `11.1` are of series `11.1`; `11.10` is not.
fn in_series(version: &str, series: &str) -> bool {
    version
        .strip_prefix(series)
        .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
}

fn require_series(what: &str, version: &str, series: &str, option: &str) -> Result<()> {
    if in_series(version, series) {
        return Ok(());
    }
    bail!("{option}: this is {what} {version}; the lab is made for {what} {series}.x")
}

/// The files of one firmware package, unpacked into `folder`.
pub fn unpack_package(logs: &Logs, package: &Path, folder: &Path) -> Result<()> {
    let name = package.file_name().unwrap_or_default().to_string_lossy();
    let short = name.split('_').next().unwrap_or("package");
    logs.run(
        &format!("unpack-{short}"),
        Command::new("dpkg-deb").arg("-x").arg(package).arg(folder),
    )
}

/// Compiler and linker, as part of a key.
pub fn compiler() -> Result<String> {
    process::output(Command::new("cc").arg("--version"))
        .map(|text| text.lines().next().unwrap_or_default().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_not_a_prefix() {
        assert!(in_series("11.1.1+ds", "11.1"));
        assert!(in_series("11.1", "11.1"));
        assert!(!in_series("11.10.0", "11.1"));
        assert!(!in_series("11.2.0", "11.1"));
        assert!(require_series("QEMU", "10.0.2", "11.1", "--qemu-src").is_err());
    }

    #[test]
    fn the_makefile_gives_the_kernels_version() {
        let text = "# SPDX\nVERSION = 7\nPATCHLEVEL = 3\nSUBLEVEL = 4\nEXTRAVERSION =\n";
        assert_eq!(parse_linux_version(text).as_deref(), Some("7.3.4"));
        assert_eq!(parse_linux_version("nothing"), None);
    }

    #[test]
    fn only_blobs_that_are_missing_are_left_out() {
        let tree = std::env::temp_dir().join(format!("gmem-lab-blobs-{}", std::process::id()));
        std::fs::create_dir_all(tree.join("pc-bios/dtb")).unwrap();
        let text = "roms = []\nif unpack_edk2_blobs\nendif\nsubdir('dtb')\nsubdir('keymaps')\n";
        let file = tree.join("pc-bios/meson.build");
        std::fs::write(&file, text).unwrap();
        std::fs::write(tree.join("pc-bios/dtb/bamboo.dtb"), "").unwrap();
        leave_out_missing_blobs(&tree).unwrap();
        let changed = std::fs::read_to_string(&file).unwrap();
        assert!(changed.contains("if unpack_edk2_blobs and false\n"));
        assert!(changed.contains("subdir('dtb')"));
        std::fs::remove_dir_all(&tree).unwrap();
    }
}
