// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo lab host`: a folder that is copied to somebody's machine, with one program to run there as root.
//!
//! Nothing of ours and nothing of that machine's is needed: QEMU is run by the loader and with the libraries that lie beside it.

use crate::cache::{sha256_of, Key};
use crate::firmware::{self, Firmware};
use crate::images::{self, Programs};
use crate::kernel::{self, Kernel};
use crate::prepare::{Ground, Prepared};
use crate::process;
use crate::qemu::{Qemu, Recipe};
use crate::sources::Sources;
use crate::tally::Verdict;
use crate::{host, patches, ui};
use anyhow::{bail, Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

pub const PROGRAM: &str = "gmem-host";
const LIST: &str = "SHA256SUMS";
const LOADER: &str = "ld-linux-x86-64.so.2";
const README: &str = include_str!("host_folder.md");

/// Each file of the folder and where it comes from. `l2/initramfs` is packed beside L1's.
pub struct Parts<'a> {
    pub kernel: &'a Kernel,
    pub qemu: &'a Qemu,
    pub firmware: &'a Firmware,
    pub programs: &'a Programs,
    pub l2: &'a Path,
}

impl<'a> Parts<'a> {
    pub fn of(prepared: &'a Prepared) -> Parts<'a> {
        Parts {
            kernel: &prepared.kernel,
            qemu: &prepared.qemu,
            firmware: &prepared.firmware,
            programs: &prepared.programs,
            l2: &prepared.images.l2,
        }
    }

    /// Names in the folder, and files of this machine.
    pub fn files(&self) -> Result<BTreeMap<String, PathBuf>> {
        let mut files = BTreeMap::new();
        let mut add = |name: &str, file: &Path| files.insert(name.to_string(), file.to_path_buf());
        add(PROGRAM, self.programs.agent());
        add("qemu-system-x86_64", &self.qemu.binary);
        add("l2/bzImage", &self.kernel.image);
        add("l2/initramfs", self.l2);
        add("l2/payload.elf", self.programs.payload());
        for entry in std::fs::read_dir(&self.firmware.share)? {
            let entry = entry?;
            add(
                &format!("share/{}", entry.file_name().to_string_lossy()),
                &entry.path(),
            );
        }
        for library in images::libraries_of(&self.qemu.binary)? {
            let name = library.file_name().context("a library without a name")?;
            add(&format!("lib/{}", name.to_string_lossy()), &library);
        }
        Ok(files)
    }
}

/// Makes the folder in the cache, or finds it.
pub fn product(ground: &Ground, parts: &Parts) -> Result<PathBuf> {
    if !parts.qemu.patched {
        bail!("this tree has no QEMU series, so there is nothing that a host could run");
    }
    let files = parts.files()?;
    let mut key = Key::new("host-folder")
        .text("recipe", "1")
        .text("readme", README);
    for (name, file) in &files {
        key = key.file(name, file)?;
    }
    ground
        .cache
        .product("host-folder", &key.finish(), |folder| {
            make(folder, &files)?;
            complete(folder)
        })
}

fn make(folder: &Path, files: &BTreeMap<String, PathBuf>) -> Result<()> {
    for (name, file) in files {
        let place = folder.join(name);
        std::fs::create_dir_all(place.parent().unwrap_or(folder))?;
        std::fs::copy(file, &place).with_context(|| format!("can't write {}", place.display()))?;
        let is_program = !name.contains('/') || name.ends_with(LOADER);
        let mode = if is_program { 0o755 } else { 0o644 };
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(mode))?;
    }
    let mut list = String::new();
    for name in files.keys() {
        list += &format!("{}  {name}\n", sha256_of(&folder.join(name))?);
    }
    std::fs::write(folder.join(LIST), list)?;
    Ok(std::fs::write(folder.join("README.md"), README)?)
}

/// Where L1 has it, and the folder. With a blank in its name, as people's folders have.
pub fn for_l1(ground: &Ground, prepared: &Prepared) -> Result<(String, PathBuf)> {
    let folder = product(ground, &Parts::of(prepared))?;
    Ok(("opt/gmem host".into(), folder))
}

/// Whether the folder has all that its programs load, and `gmem-host` needs nothing.
pub fn complete(folder: &Path) -> Result<()> {
    let needed = |name: &str| -> Result<BTreeSet<String>> {
        let path = folder.join(name);
        let text = process::output(Command::new("readelf").args(["-d", "-W"]).arg(&path))?;
        Ok(needed_libraries(&text))
    };
    let own = needed(PROGRAM)?;
    if !own.is_empty() {
        bail!("{PROGRAM} is to be static and needs {own:?}");
    }
    if !folder.join("lib").join(LOADER).is_file() {
        bail!("the folder has no lib/{LOADER}, without which QEMU can't be run");
    }
    let mut waiting = vec!["qemu-system-x86_64".to_string()];
    let mut seen = BTreeSet::new();
    while let Some(name) = waiting.pop() {
        for library in needed(&name)? {
            let place = format!("lib/{library}");
            if !folder.join(&place).is_file() {
                bail!("{name} loads {library}, which is not in the folder");
            }
            if seen.insert(place.clone()) {
                waiting.push(place);
            }
        }
    }
    // What is looked up in folders of this machine's would not be found on another.
    let version = process::output(
        Command::new(folder.join("lib").join(LOADER))
            .arg("--library-path")
            .arg(folder.join("lib"))
            .arg(folder.join("qemu-system-x86_64"))
            .arg("--version")
            .env_clear(),
    )?;
    if !version.starts_with("QEMU emulator version") {
        bail!("QEMU from the folder says {version:?}");
    }
    Ok(())
}

/// The name under which `cargo lab test` counts `here`.
pub const HERE: &str = "gmem-host on this machine";

/// Runs the folder's program on this very machine, if that has what the smallest guest needs.
pub fn here(ground: &Ground, prepared: &Prepared) -> Result<Verdict> {
    if !host::is_root() {
        return Ok(Verdict::Skipped("it needs root".into()));
    }
    if std::fs::File::open("/dev/kvm").is_err() {
        return Ok(Verdict::Skipped("this machine has no /dev/kvm".into()));
    }
    let folder = {
        let _cache = ground.cache.lock()?;
        product(ground, &Parts::of(prepared))?
    };
    let report = ground.tree.results().join("gmem-host");
    for ending in ["json", "txt", "log"] {
        let _ = std::fs::remove_file(report.with_extension(ending));
    }
    let step = ui::step(PROGRAM, "on this machine");
    let result = ground.logs.run(
        "gmem-host",
        Command::new(folder.join(PROGRAM))
            .args(["--only", "ordinary-small", "--patience", "10", "--report"])
            .arg(&report)
            .current_dir("/"),
    );
    drop(step);
    let log = std::fs::read_to_string(ground.logs.path("gmem-host")).unwrap_or_default();
    Ok(match result {
        Ok(()) => Verdict::Passed,
        // A kernel before 6.18: the program says so, and that is right.
        Err(_) if log.contains("nothing of what was asked for can run here") => {
            let last = log.lines().last().unwrap_or_default();
            Verdict::Skipped(last.to_string())
        }
        Err(error) => Verdict::Failed(format!("{error:#}")),
    })
}

/// DT_NEEDED in the output of `readelf -d`.
fn needed_libraries(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_string()))
        .collect()
}

/// The files that this made in a folder before, by its list; `None` if it did not make it.
fn earlier(folder: &Path) -> Option<Vec<String>> {
    let list = std::fs::read_to_string(folder.join(LIST)).ok()?;
    let names: Option<Vec<String>> = list
        .lines()
        .map(|line| {
            let (hash, name) = line.split_once("  ")?;
            let is_inside = !name.starts_with('/') && !name.split('/').any(|part| part == "..");
            (hash.len() == 64 && is_inside).then(|| name.to_string())
        })
        .collect();
    names.filter(|names| names.iter().any(|name| name == PROGRAM))
}

/// The command.
pub fn run(ground: &Ground, prefix: &Path) -> Result<()> {
    // Said before minutes of building, not after.
    std::fs::create_dir_all(prefix)
        .with_context(|| format!("can't create {}", prefix.display()))?;
    let ours = earlier(prefix);
    let is_ours = ours.is_some();
    if !is_ours && std::fs::read_dir(prefix)?.next().is_some() {
        bail!(
            "{} has other things in it: choose an empty folder with --prefix",
            prefix.display()
        );
    }
    let _cache = ground.cache.lock()?;
    host::prepare(&ground.logs)?;
    let sources = Sources::new(&ground.cache, &ground.logs);
    let linux = sources.linux(ground.choices.kernel_src.as_deref())?;
    let series = match ground.choices.unpatched_kernel || kernel::converts_in_place(&linux) {
        true => Vec::new(),
        false => patches::series(&ground.tree.kernel_series())?,
    };
    let fragment = ground.tree.kernel_fragment();
    let kernel = kernel::build(&ground.cache, &ground.logs, &linux, &fragment, &series)?;
    let source = sources.qemu(ground.choices.qemu_src.as_deref())?;
    let firmware = firmware::prepare(&sources)?;
    let programs = images::programs(&ground.cache, &ground.logs, &ground.tree)?;
    let qemu = Recipe::new(&ground.cache, &ground.logs, &ground.tree, &source)?.build()?;
    let images = images::pack(&ground.cache, &kernel, &qemu, &firmware, &programs, None)?;
    let made = product(
        ground,
        &Parts {
            kernel: &kernel,
            qemu: &qemu,
            firmware: &firmware,
            programs: &programs,
            l2: &images.l2,
        },
    )?;
    // What is there besides stays.
    for name in ours.into_iter().flatten() {
        let _ = std::fs::remove_file(prefix.join(name));
    }
    process::output(Command::new("cp").args(["-aT"]).arg(&made).arg(prefix))
        .with_context(|| format!("can't fill {}", prefix.display()))?;
    ui::line(&format!(
        "made {}: copy it to the host, there run {PROGRAM} in it as root",
        prefix.display()
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_the_dynamic_section() {
        let text = "\n 0x0000000000000001 (NEEDED)             Shared library: [libz.so.1]\n \
                    0x000000000000000e (SONAME)             Library soname: [libx.so]\n \
                    0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]\n";
        let found: Vec<_> = needed_libraries(text).into_iter().collect();
        assert_eq!(found, ["libc.so.6", "libz.so.1"]);
        assert!(needed_libraries("There is no dynamic section in this file.\n").is_empty());
    }

    #[test]
    fn a_program_that_needs_libraries_is_no_program_for_a_host() {
        let folder = std::env::temp_dir().join(format!("gmem-folder-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::copy(std::env::current_exe().unwrap(), folder.join(PROGRAM)).unwrap();
        let refusal = complete(&folder).unwrap_err().to_string();
        assert!(refusal.contains("static"), "{refusal}");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn only_a_folder_of_ours_is_made_again() {
        let folder = std::env::temp_dir().join(format!("gmem-earlier-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        assert_eq!(earlier(&folder), None);
        let hash = "0".repeat(64);
        let write = |text: String| std::fs::write(folder.join(LIST), text).unwrap();
        write(format!("{hash}  debian.iso\n"));
        assert_eq!(earlier(&folder), None);
        write(format!("{hash}  gmem-host\n{hash}  ../../etc/passwd\n"));
        assert_eq!(earlier(&folder), None);
        write(format!("{hash}  gmem-host\n{hash}  lib/libz.so.1\n"));
        assert_eq!(earlier(&folder).unwrap().len(), 2);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_program_in_the_folder_checks_the_same_list() {
        let agent = include_str!("../agent/src/on_host/checks.rs");
        assert!(agent.contains(&format!("const LIST: &str = \"{LIST}\"")));
        assert!(include_str!("../agent/src/place.rs").contains(LOADER));
    }
}
