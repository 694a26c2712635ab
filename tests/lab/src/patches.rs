// SPDX-License-Identifier: MIT OR Apache-2.0
//! A series of patches, QEMU's or the kernel's, on a tree that is built incrementally.
//!
//! Patches are applied to copies of just the files that they name; what comes out is compared with the build's tree and only
//! files that differ are written. So an edited patch costs the recompilation of what it changed.

use crate::process::Logs;
use anyhow::{bail, Context, Result};
use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

/// Patch files of a series in the order of their names.
pub fn series(folder: &Path) -> Result<Vec<PathBuf>> {
    let Ok(listing) = std::fs::read_dir(folder) else {
        return Ok(Vec::new());
    };
    let mut patches = Vec::new();
    for entry in listing {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "patch")
        {
            patches.push(path);
        }
    }
    patches.sort();
    Ok(patches)
}

/// Brings `tree`, a copy of `pristine` with some series applied, to `pristine` with `patches` applied. `what` is its name and
/// version, for an error. Files of the copy may be hard links to the pristine ones: none is written to, only replaced.
pub fn apply(
    pristine: &Path,
    tree: &Path,
    patches: &[PathBuf],
    what: &str,
    logs: &Logs,
) -> Result<()> {
    let staging = tree.with_extension("staging");
    if staging.exists() {
        std::fs::remove_dir_all(&staging)?;
    }
    std::fs::create_dir_all(&staging)?;
    let mut named = BTreeSet::new();
    for patch in patches {
        let text = std::fs::read_to_string(patch)
            .with_context(|| format!("can't read {}", patch.display()))?;
        named.extend(named_files(&text));
    }
    for file in &named {
        copy_if_there(&pristine.join(file), &staging.join(file))?;
    }
    for patch in patches {
        let name = patch.file_name().unwrap_or_default().to_string_lossy();
        let mut command = Command::new("patch");
        command
            .args([
                "-p1",
                "--forward",
                "--batch",
                "--no-backup-if-mismatch",
                "-d",
            ])
            .arg(&staging)
            .arg("-i")
            .arg(patch);
        if let Err(error) = logs.run(&format!("patch-{}", patch_stem(patch)), &mut command) {
            crate::interrupt::check()?;
            bail!("{name} does not apply to {what}: {error}");
        }
    }
    // What an earlier series touched and this one does not goes back to how it came.
    let all: BTreeSet<PathBuf> = named.union(&touched(tree)).cloned().collect();
    let list: String = all
        .iter()
        .map(|file| format!("{}\n", file.display()))
        .collect();
    std::fs::write(manifest(tree), list)?;
    for file in &all {
        let wanted = if named.contains(file) {
            staging.join(file)
        } else {
            pristine.join(file)
        };
        bring(&wanted, &tree.join(file))?;
    }
    std::fs::remove_dir_all(&staging)?;
    Ok(())
}

/// Files of a tree that some series has touched since the tree was made.
pub fn touched(tree: &Path) -> BTreeSet<PathBuf> {
    let list = std::fs::read_to_string(manifest(tree)).unwrap_or_default();
    list.lines().map(PathBuf::from).collect()
}

fn manifest(tree: &Path) -> PathBuf {
    tree.with_extension("patched")
}

/// `0001-backends-the-object` of `…/0001-backends-the-object.patch`.
pub fn patch_stem(patch: &Path) -> String {
    patch
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Files that a patch reads, writes, makes or removes. A line inside a hunk that looks like a header adds a name that is in
/// no tree, which does no harm.
fn named_files(patch: &str) -> BTreeSet<PathBuf> {
    patch
        .lines()
        .filter_map(|line| {
            let name = (line.strip_prefix("--- a/"))
                .or_else(|| line.strip_prefix("+++ b/"))
                .or_else(|| line.strip_prefix("rename from "))
                .or_else(|| line.strip_prefix("rename to "))
                .or_else(|| line.strip_prefix("copy from "))
                .or_else(|| line.strip_prefix("copy to "))?;
            let path = PathBuf::from(name.split('\t').next().unwrap_or(name).trim_end());
            let inside = path
                .components()
                .all(|part| matches!(part, Component::Normal(_)));
            (inside && !path.as_os_str().is_empty()).then_some(path)
        })
        .collect()
}

fn copy_if_there(from: &Path, to: &Path) -> Result<()> {
    if !from.is_file() {
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::copy(from, to).with_context(|| format!("can't copy {}", from.display()))?;
    Ok(())
}

/// Makes `place` like `wanted` (absent if that is), leaving its time alone when it is already.
fn bring(wanted: &Path, place: &Path) -> Result<()> {
    if !wanted.is_file() {
        if place.is_file() {
            std::fs::remove_file(place)?;
        }
        return Ok(());
    }
    let same = std::fs::read(place).is_ok_and(|old| {
        std::fs::read(wanted).is_ok_and(|new| new == old)
            && mode(place).is_some_and(|old| Some(old) == mode(wanted))
    });
    if same {
        return Ok(());
    }
    if place.is_file() {
        std::fs::remove_file(place)?;
    }
    copy_if_there(wanted, place)
}

fn mode(path: &Path) -> Option<u32> {
    use std::os::unix::fs::PermissionsExt;
    Some(std::fs::metadata(path).ok()?.permissions().mode())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "\
From 0 Mon Sep 17 00:00:00 2001
Subject: one

---
diff --git a/kept b/kept
--- a/kept
+++ b/kept
@@ -1 +1 @@
-old
+new
diff --git a/made/here b/made/here
new file mode 100644
--- /dev/null
+++ b/made/here
@@ -0,0 +1 @@
+fresh
";
    const SECOND: &str = "\
diff --git a/made/here b/made/here
--- a/made/here
+++ b/made/here
@@ -1 +1 @@
-fresh
+fresher
";

    #[test]
    fn files_are_named_and_none_outside_the_tree() {
        let text = format!("{FIRST}--- a/../escape\n+++ b//etc/passwd\nrename from x/y\n");
        let names: Vec<String> = named_files(&text)
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        assert_eq!(names, ["kept", "made/here", "x/y"]);
    }

    #[test]
    fn a_tree_follows_the_series_and_untouched_files_keep_their_time() {
        let root = std::env::temp_dir().join(format!("gmem-lab-series-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&root);
        let (pristine, tree) = (root.join("pristine"), root.join("tree"));
        for folder in [&pristine, &tree] {
            std::fs::create_dir_all(folder).unwrap();
        }
        std::fs::write(pristine.join("kept"), "old\n").unwrap();
        std::fs::hard_link(pristine.join("kept"), tree.join("kept")).unwrap();
        let logs = Logs::new(root.join("logs"));
        let patches = [root.join("1.patch"), root.join("2.patch")];
        std::fs::write(&patches[0], FIRST).unwrap();
        std::fs::write(&patches[1], SECOND).unwrap();
        let read = |name: &str| std::fs::read_to_string(tree.join(name)).ok();

        apply(&pristine, &tree, &patches, "x", &logs).unwrap();
        assert_eq!(read("kept").as_deref(), Some("new\n"));
        assert_eq!(read("made/here").as_deref(), Some("fresher\n"));
        let time = std::fs::metadata(tree.join("kept"))
            .unwrap()
            .modified()
            .unwrap();

        apply(&pristine, &tree, &patches[..1], "x", &logs).unwrap();
        assert_eq!(read("made/here").as_deref(), Some("fresh\n"));
        let again = std::fs::metadata(tree.join("kept"))
            .unwrap()
            .modified()
            .unwrap();
        assert_eq!(time, again);

        let untouched = std::fs::read_to_string(pristine.join("kept")).unwrap();
        assert_eq!(untouched, "old\n");

        apply(&pristine, &tree, &[], "x", &logs).unwrap();
        assert_eq!(read("kept").as_deref(), Some("old\n"));
        assert_eq!(read("made/here"), None);

        std::fs::write(pristine.join("kept"), "different\n").unwrap();
        let error = apply(&pristine, &tree, &patches, "x", &logs).unwrap_err();
        assert!(error.to_string().contains("1.patch does not apply"));
        std::fs::remove_dir_all(&root).unwrap();
    }
}
