// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel of L1 and of a Linux L2: tinyconfig plus `kernel.config`.

use crate::cache::{Cache, Key};
use crate::host;
use crate::process::Logs;
use crate::sources::{self, Source};
use crate::ui;
use anyhow::{bail, Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compile and link steps of a build with our configuration: only for the percentage shown.
const STEPS: usize = 2520;

pub struct Kernel {
    pub image: PathBuf,
    pub key: String,
}

/// Builds the kernel, or finds it.
pub fn build(cache: &Cache, logs: &Logs, source: &Source, fragment: &Path) -> Result<Kernel> {
    let wanted = std::fs::read_to_string(fragment)
        .with_context(|| format!("can't read {}", fragment.display()))?;
    let key = Key::new("kernel")
        .text("recipe", "1")
        .text("source", &source.key)
        .text("config", &wanted)
        .text("compiler", &sources::compiler()?)
        .finish();
    let product = cache.product("kernel", &key, |folder| {
        let step = ui::step("kernel", "configuring");
        let objects = objects(cache, source)?;
        configure(logs, source, &objects, fragment, &wanted)?;
        compile(logs, source, &objects, &step)?;
        for (from, to) in [("arch/x86/boot/bzImage", "bzImage"), (".config", "config")] {
            let from = objects.join(from);
            std::fs::copy(&from, folder.join(to))
                .with_context(|| format!("the kernel build left no {}", from.display()))?;
        }
        step.done(&format!("Linux {} built", source.version));
        Ok(())
    })?;
    Ok(Kernel {
        image: product.join("bzImage"),
        key,
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
        logs.run("kernel-headers", make(source, &objects).arg("headers"))?;
        std::fs::rename(objects.join("usr/include"), folder.join("include"))
            .context("the kernel's `make headers` left no usr/include")?;
        std::fs::remove_dir_all(&objects)?;
        step.done("kernel headers ready");
        Ok(())
    })
}

/// The object folder; emptied when it belongs to another source tree.
fn objects(cache: &Cache, source: &Source) -> Result<PathBuf> {
    let folder = cache.work("kernel");
    let stamp = folder.join("source-key");
    if std::fs::read_to_string(&stamp).is_ok_and(|key| key == source.key) {
        return Ok(folder);
    }
    if folder.exists() {
        std::fs::remove_dir_all(&folder)
            .with_context(|| format!("can't empty {}", folder.display()))?;
    }
    std::fs::create_dir_all(&folder)?;
    std::fs::write(&stamp, &source.key)?;
    Ok(folder)
}

/// `make` in the source tree with the object folder, in a way that doesn't depend on machine or time.
fn make(source: &Source, objects: &Path) -> Command {
    let mut command = Command::new("make");
    command
        .arg("-C")
        .arg(&source.tree)
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
    objects: &Path,
    fragment: &Path,
    wanted: &str,
) -> Result<()> {
    logs.run("kernel-tinyconfig", make(source, objects).arg("tinyconfig"))?;
    logs.run(
        "kernel-merge",
        Command::new(source.tree.join("scripts/kconfig/merge_config.sh"))
            .args(["-m", "-O"])
            .arg(objects)
            .arg(objects.join(".config"))
            .arg(fragment)
            .current_dir(&source.tree),
    )?;
    logs.run(
        "kernel-olddefconfig",
        make(source, objects).arg("olddefconfig"),
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

fn compile(logs: &Logs, source: &Source, objects: &Path, step: &ui::Step) -> Result<()> {
    let mut steps = 0;
    let mut command = make(source, objects);
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
