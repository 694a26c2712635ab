// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel of L1 and of a Linux L2: tinyconfig plus `kernel.config`, with the series in `kernel-patches/` or without.
//!
//! A build's tree is made of hard links to the sources, with files of its own where the series changes them, and the object
//! folder is inside of it: make then names its files relative to the tree, and so a copy of all that is as good as it, in
//! another cache too.

use crate::cache::{Cache, Key};
use crate::host;
use crate::mode::Mode;
use crate::patches;
use crate::process::Logs;
use crate::sources::{self, Source};
use crate::ui;
use anyhow::{bail, Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compile and link steps of a build with our configuration: only for the percentage shown.
const STEPS: usize = 2520;

/// Where the two kernels are built.
const PATCHED: &str = "kernel";
const UNPATCHED: &str = "kernel-unpatched";
/// Beside a build's tree: which sources it shows, and in which way.
const STAMP: &str = "source-key";

pub struct Kernel {
    pub image: PathBuf,
    pub key: String,
    /// Whether the series is applied.
    patched: bool,
    /// Whether there is an in-place conversion to test: the series', or one that the sources came with.
    in_place: bool,
}

impl Kernel {
    /// Whether it can be booted in a mode of that kind.
    pub fn offers(&self, mode: Mode) -> bool {
        match mode {
            Mode::Split | Mode::Unpatched => true,
            Mode::InPlace => self.in_place,
            // Switches of the series' own.
            Mode::NoDirectMap | Mode::Foreign => self.patched,
        }
    }
}

/// Whether the sources convert in place as they come.
pub fn converts_in_place(source: &Source) -> bool {
    let file = source.tree.join("virt/kvm/guest_memfd.c");
    std::fs::read_to_string(file).is_ok_and(|text| text.contains("gmem_in_place_conversion"))
}

/// Builds the kernel with these patches, or finds it.
pub fn build(
    cache: &Cache,
    logs: &Logs,
    source: &Source,
    fragment: &Path,
    series: &[PathBuf],
) -> Result<Kernel> {
    let wanted = std::fs::read_to_string(fragment)
        .with_context(|| format!("can't read {}", fragment.display()))?;
    let mut key = Key::new("kernel")
        .text("recipe", "1")
        .text("source", &source.key)
        .text("config", &wanted)
        .text("compiler", &sources::compiler()?);
    for patch in series {
        key = key.file(&patches::patch_stem(patch), patch)?;
    }
    let key = key.finish();
    let product = cache.product("kernel", &key, |folder| {
        let step = ui::step("kernel", "preparing the tree");
        let place = if series.is_empty() {
            UNPATCHED
        } else {
            PATCHED
        };
        let tree = tree(cache, logs, source, place)?;
        let what = format!("Linux {}", source.version);
        patches::apply(&source.tree, &tree, series, &what, logs)?;
        let objects = tree.join("objects");
        std::fs::create_dir_all(&objects)?;
        step.turn("configuring");
        configure(logs, source, &tree, &objects, fragment, &wanted)?;
        compile(logs, &tree, &objects, &step)?;
        for (from, to) in [("arch/x86/boot/bzImage", "bzImage"), (".config", "config")] {
            let from = objects.join(from);
            std::fs::copy(&from, folder.join(to))
                .with_context(|| format!("the kernel build left no {}", from.display()))?;
        }
        step.done(&format!("{what} with {} patches built", series.len()));
        Ok(())
    })?;
    Ok(Kernel {
        image: product.join("bzImage"),
        key,
        patched: !series.is_empty(),
        in_place: !series.is_empty() || converts_in_place(source),
    })
}

/// The kernel's headers for user space, as `include/` in the folder that is returned.
pub fn headers(cache: &Cache, logs: &Logs, source: &Source) -> Result<PathBuf> {
    let key = Key::new("headers")
        .text("recipe", "1")
        .text("source", &source.key)
        .finish();
    cache.product("headers", &key, |folder| {
        let step = ui::step("headers", "installing");
        let objects = folder.join("objects");
        std::fs::create_dir(&objects)?;
        logs.run(
            "kernel-headers",
            make(&source.tree, &objects).arg("headers"),
        )?;
        std::fs::rename(objects.join("usr/include"), folder.join("include"))
            .context("the kernel's `make headers` left no usr/include")?;
        std::fs::remove_dir_all(&objects)?;
        step.done("kernel headers ready");
        Ok(())
    })
}

/// The tree of a build; made anew when it shows other sources. The objects of the other kernel's build are taken over: the
/// two differ in what the series touches.
fn tree(cache: &Cache, logs: &Logs, source: &Source, place: &str) -> Result<PathBuf> {
    let folder = cache.work(place);
    let tree = folder.join("tree");
    let stamp = format!("{} in hard links", source.key);
    let shows = |folder: &Path| {
        std::fs::read_to_string(folder.join(STAMP)).is_ok_and(|found| found == stamp)
    };
    if shows(&folder) {
        return Ok(tree);
    }
    if folder.exists() {
        std::fs::remove_dir_all(&folder)
            .with_context(|| format!("can't empty {}", folder.display()))?;
    }
    std::fs::create_dir_all(&folder)?;
    let copy = |how: &str, from: &Path, to: &Path| {
        let mut command = Command::new("cp");
        logs.run(&format!("{place}-tree"), command.arg(how).arg(from).arg(to))
    };
    copy("-al", &source.tree, &tree)?;
    let other = cache.work(if place == PATCHED { UNPATCHED } else { PATCHED });
    if shows(&other) {
        let other = other.join("tree");
        // Its objects are of its own versions of these, and make goes by time.
        for file in patches::touched(&other) {
            let (from, to) = (source.tree.join(&file), tree.join(&file));
            if from.is_file() {
                std::fs::remove_file(&to)?;
                std::fs::copy(from, to)?;
            }
        }
        copy("-a", &other.join("objects"), &tree.join("objects"))?;
    }
    std::fs::write(folder.join(STAMP), &stamp)?;
    Ok(tree)
}

/// `make` in the source tree with the object folder, in a way that doesn't depend on machine or time.
fn make(tree: &Path, objects: &Path) -> Command {
    let mut command = Command::new("make");
    command
        .arg("-C")
        .arg(tree)
        .arg(format!("O={}", objects.display()))
        .env("KBUILD_BUILD_USER", "lab")
        .env("KBUILD_BUILD_HOST", "lab")
        .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
        .env("LC_ALL", "C.UTF-8");
    command
}

fn configure(
    logs: &Logs,
    source: &Source,
    tree: &Path,
    objects: &Path,
    fragment: &Path,
    wanted: &str,
) -> Result<()> {
    logs.run("kernel-tinyconfig", make(tree, objects).arg("tinyconfig"))?;
    logs.run(
        "kernel-merge",
        Command::new(tree.join("scripts/kconfig/merge_config.sh"))
            .args(["-m", "-O"])
            .arg(objects)
            .arg(objects.join(".config"))
            .arg(fragment)
            .current_dir(tree),
    )?;
    logs.run(
        "kernel-olddefconfig",
        make(tree, objects).arg("olddefconfig"),
    )?;
    let config = std::fs::read_to_string(objects.join(".config"))?;
    let lost = without_effect(wanted, &config);
    if !lost.is_empty() {
        bail!(
            "Linux {} does not take these lines of {} (renamed, removed, or a dependency is missing): {}",
            source.version,
            fragment.display(),
            lost.join(", ")
        );
    }
    Ok(())
}

fn compile(logs: &Logs, tree: &Path, objects: &Path, step: &ui::Step) -> Result<()> {
    let mut steps = 0;
    let mut command = make(tree, objects);
    command.arg(format!("-j{}", host::jobs())).arg("bzImage");
    logs.run_lines("kernel-build", &mut command, |line| {
        // "  CC      mm/shmem.o": anything else is make talking.
        if line.starts_with("  ") {
            steps += 1;
            let file = line.split_whitespace().last().unwrap_or_default();
            let percent = (steps * 100 / STEPS).min(99);
            step.update(&format!("building, {percent} %: {file}"));
        }
    })
}

/// Lines of the fragment that the finished configuration does not have.
fn without_effect(wanted: &str, config: &str) -> Vec<String> {
    let has = |line: &str| config.lines().any(|other| other == line);
    wanted
        .lines()
        .map(str::trim_end)
        .filter(|line| match unset(line) {
            Some(name) => config
                .lines()
                .any(|other| (other.strip_prefix(name)).is_some_and(|rest| rest.starts_with('='))),
            None => line.starts_with("CONFIG_") && !has(line),
        })
        .map(str::to_string)
        .collect()
}

/// The name in `# NAME is not set`.
fn unset(line: &str) -> Option<&str> {
    line.strip_prefix("# ")?.strip_suffix(" is not set")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_without_effect_are_found_and_no_others() {
        let wanted = "# a comment\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n# CONFIG_D is not set\nCONFIG_E=-1\n";
        let config =
            "CONFIG_A=y\n# CONFIG_B is not set\n# CONFIG_C is not set\nCONFIG_D=y\nCONFIG_E=-1\n";
        assert_eq!(
            without_effect(wanted, config),
            ["CONFIG_B=y", "# CONFIG_D is not set"]
        );
    }
}
