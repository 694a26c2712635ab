// SPDX-License-Identifier: MIT OR Apache-2.0
//! The gmem library as QEMU's configure finds it: built and installed by the tree's meson.build into a prefix of the cache.

use crate::cache::{self, Cache, Key};
use crate::process::{self, Logs};
use crate::{tree::Tree, ui};
use anyhow::{bail, Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

pub struct Library {
    /// Has gmem.pc; always the same folder, so that QEMU only relinks when the archive in it changes.
    pub pkg_config: PathBuf,
    /// Of the archive and the header: what ends up in QEMU.
    pub digest: String,
}

/// Builds the library unless what it is made of is what was built last.
pub fn build(cache: &Cache, logs: &Logs, tree: &Tree, meson: &Path) -> Result<Library> {
    let root = tree.root();
    let folder = cache.work("library");
    let prefix = folder.join("prefix");
    let stamp = folder.join("built-key");
    let key = inputs(root)?;
    if !std::fs::read_to_string(&stamp).is_ok_and(|built| built == key) {
        let step = ui::step("library", "building");
        let _ = std::fs::remove_file(&stamp);
        install(logs, root, &folder, &prefix, meson)?;
        std::fs::write(&stamp, &key)?;
        step.done("library built");
    }
    let archive = prefix.join("lib/libgmem.a");
    let header = prefix.join("include/gmem.h");
    let digest = Key::new("library")
        .file("archive", &archive)?
        .file("header", &header)?
        .finish();
    Ok(Library {
        pkg_config: prefix.join("lib/pkgconfig"),
        digest,
    })
}

fn install(logs: &Logs, root: &Path, folder: &Path, prefix: &Path, meson: &Path) -> Result<()> {
    if !root.join("meson.build").is_file() {
        bail!("the tree has no meson.build, so QEMU can't be linked with the library");
    }
    let build = folder.join("build");
    let with_environment = |command: &mut Command| {
        command
            .env("CARGO_TARGET_DIR", folder.join("target"))
            .env("LC_ALL", "C.UTF-8");
    };
    // A build folder of another meson or another place of the tree is refused by meson: start over then.
    let origin = format!("{} {}", root.display(), meson.display());
    let origin_file = folder.join("origin");
    if !std::fs::read_to_string(&origin_file).is_ok_and(|text| text == origin) {
        let _ = std::fs::remove_dir_all(&build);
    }
    if !build.join("build.ninja").exists() {
        let mut setup = Command::new(meson);
        setup
            .arg("setup")
            .arg("--prefix")
            .arg(prefix)
            .args(["--libdir", "lib", "--buildtype", "release"])
            .arg(&build)
            .arg(root);
        with_environment(&mut setup);
        logs.run("library-setup", &mut setup)?;
        std::fs::write(&origin_file, origin)?;
    }
    let mut install = Command::new(meson);
    install
        .args(["install", "--only-changed", "-C"])
        .arg(&build);
    with_environment(&mut install);
    logs.run("library-build", &mut install)
}

/// A key of everything that the library is made from.
fn inputs(root: &Path) -> Result<String> {
    let mut key = Key::new("library-inputs").text(
        "rustc",
        &process::output(Command::new("rustc").arg("-vV").current_dir(root))?,
    );
    let mut files = Vec::new();
    for name in [
        "Cargo.toml",
        "Cargo.lock",
        "cbindgen.toml",
        "build.rs",
        "meson.build",
        "meson_options.txt",
        "meson.options",
        "rust-toolchain.toml",
    ] {
        files.push(root.join(name));
    }
    for folder in ["src", "include", "build-aux"] {
        files_below(&root.join(folder), &mut files)?;
    }
    files.sort();
    for file in files.iter().filter(|file| file.is_file()) {
        let name = file.strip_prefix(root).unwrap_or(file).to_string_lossy();
        key = key.text(&name, &cache::sha256_of(file)?);
    }
    Ok(key.finish())
}

fn files_below(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("can't read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            files_below(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_source_changes_the_key_and_a_test_does_not() {
        let root = std::env::temp_dir().join(format!("gmem-lab-inputs-{}", std::process::id()));
        std::fs::create_dir_all(root.join("src/deep")).unwrap();
        std::fs::create_dir_all(root.join("tests")).unwrap();
        let set = |name: &str, text: &str| std::fs::write(root.join(name), text).unwrap();
        set("Cargo.toml", "x");
        set("src/deep/a.rs", "1");
        let first = inputs(&root).unwrap();
        assert_eq!(first, inputs(&root).unwrap());
        set("tests/t.rs", "1");
        assert_eq!(first, inputs(&root).unwrap());
        set("src/deep/a.rs", "2");
        assert_ne!(first, inputs(&root).unwrap());
        std::fs::remove_dir_all(&root).unwrap();
    }
}
