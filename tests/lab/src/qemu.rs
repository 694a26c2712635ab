// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU with the series applied: the same binary is L0's emulator and, in L1, the one under test.

use crate::cache::{Cache, Key};
use crate::library::{self, Library};
use crate::patches;
use crate::process::{self, Logs};
use crate::sources::{self, Source};
use crate::{host, tree::Tree, ui};
use anyhow::{bail, Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What QEMU's build needs of Python and Debian 12 has too old or not at all.
const REQUIREMENTS: &str = "\
meson==1.11.1 --hash=sha256:9b3a023657e393dbc5335b95c561337d49b7a458f5541e47ec44f2cc566e0d80
pycotap==1.3.1 --hash=sha256:1c3a25b3ff89e48f4e00f1f71dbbc1642b4f65c65d416524d07e73492fff25ea
";

const CONFIGURE: &[&str] = &[
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-kvm",
    "--enable-tcg",
    "--enable-system",
    "--enable-fdt=system",
    // Devices whose back end is the host's kernel or another process, and such a process.
    "--enable-vhost-kernel",
    "--enable-vhost-net",
    "--enable-vhost-vdpa",
    "--enable-vhost-user",
    "--enable-vhost-user-blk-server",
    "--enable-tools",
    "--disable-docs",
    "--disable-debug-info",
    "--disable-install-blobs",
];

/// What of QEMU the lab runs, by its place in the object folder.
const PROGRAMS: [&str; 2] = ["qemu-system-x86_64", "storage-daemon/qemu-storage-daemon"];

pub struct Qemu {
    pub binary: PathBuf,
    /// A back end in a process of its own.
    pub storage_daemon: PathBuf,
    pub key: String,
    /// Whether the series is applied, so that there is a memory-backend-gmem to test.
    pub patched: bool,
}

/// Everything a build of QEMU is made from.
pub struct Recipe<'a> {
    pub cache: &'a Cache,
    pub logs: &'a Logs,
    pub source: &'a Source,
    python: PathBuf,
    library: Option<Library>,
    series: Vec<PathBuf>,
    /// Patches on top of the series that only a benchmark wants.
    benchmark: Vec<PathBuf>,
}

impl<'a> Recipe<'a> {
    /// Prepares meson, and the library if there is a series that wants it.
    pub fn new(
        cache: &'a Cache,
        logs: &'a Logs,
        tree: &Tree,
        source: &'a Source,
    ) -> Result<Recipe<'a>> {
        let series = patches::series(&tree.series())?;
        let environment = python_environment(cache, logs)?;
        let library = if series.is_empty() {
            None
        } else {
            let meson = environment.join("bin/meson");
            Some(library::build(cache, logs, tree, &meson)?)
        };
        Ok(Recipe {
            cache,
            logs,
            source,
            python: environment.join("bin/python3"),
            library,
            series,
            benchmark: Vec::new(),
        })
    }

    /// The same with these patches on top. Both are built in one tree, where they differ in a few files.
    pub fn with_benchmark(self, patches: Vec<PathBuf>) -> Recipe<'a> {
        Recipe {
            benchmark: patches,
            ..self
        }
    }

    /// Builds QEMU with all patches, or finds it.
    pub fn build(&self) -> Result<Qemu> {
        let kind = if self.benchmark.is_empty() {
            "qemu"
        } else {
            "qemu-bench"
        };
        let patches: Vec<PathBuf> = self.series.iter().chain(&self.benchmark).cloned().collect();
        let mut key = Key::new("qemu")
            .text("recipe", "2")
            .text("source", &self.source.key)
            .text("configure", &CONFIGURE.join(" "))
            .text("tools", REQUIREMENTS)
            .text("compiler", &sources::compiler()?);
        for patch in &patches {
            key = key.file(&patches::patch_stem(patch), patch)?;
        }
        if let Some(library) = &self.library {
            key = key.text("library", &library.digest);
        }
        let key = key.finish();
        let product = self.cache.product(kind, &key, |folder| {
            let step = ui::step(kind, "applying the series");
            let objects = self.compile(&patches, &PROGRAMS, &step)?;
            for program in PROGRAMS.map(|place| objects.join(place)) {
                let name = program.file_name().context("a program has a name")?;
                self.logs.run(
                    "qemu-strip",
                    Command::new("strip")
                        .arg("-o")
                        .arg(folder.join(name))
                        .arg(&program),
                )?;
            }
            step.done(&format!(
                "QEMU {} with {} patches built",
                self.source.version,
                patches.len()
            ));
            Ok(())
        })?;
        Ok(Qemu {
            binary: product.join("qemu-system-x86_64"),
            storage_daemon: product.join("qemu-storage-daemon"),
            key,
            patched: !patches.is_empty(),
        })
    }

    pub fn series(&self) -> &[PathBuf] {
        &self.series
    }

    /// Applies `patches` and no others and builds `targets` (none: everything). Returns the object folder.
    pub fn compile(
        &self,
        patches: &[PathBuf],
        targets: &[&str],
        step: &ui::Step,
    ) -> Result<PathBuf> {
        let (tree, objects) = self.folders()?;
        patches::apply(
            &self.source.tree,
            &tree,
            patches,
            &format!("QEMU {}", self.source.version),
            self.logs,
        )?;
        self.configure(&tree, &objects, step)?;
        let mut command = Command::new("ninja");
        command
            .arg("-C")
            .arg(&objects)
            .arg(format!("-j{}", host::jobs()))
            .args(targets);
        self.environment(&mut command);
        self.logs.run_lines("qemu-build", &mut command, |line| {
            if let Some((done, total)) = ninja_progress(line) {
                step.update(&format!("building, {done} of {total} steps"));
            }
        })?;
        Ok(objects)
    }

    /// The tree that patches go to and its object folder; made anew when they belong to another source.
    fn folders(&self) -> Result<(PathBuf, PathBuf)> {
        let folder = self.cache.work("qemu");
        let (tree, objects, stamp) = (
            folder.join("tree"),
            folder.join("objects"),
            folder.join("source-key"),
        );
        let identity = format!("{} {}", self.source.key, self.python.display());
        if !std::fs::read_to_string(&stamp).is_ok_and(|text| text == identity) {
            if folder.exists() {
                std::fs::remove_dir_all(&folder)
                    .with_context(|| format!("can't empty {}", folder.display()))?;
            }
            std::fs::create_dir_all(&folder)?;
            self.logs.run(
                "qemu-copy",
                Command::new("cp")
                    .arg("-a")
                    .arg(&self.source.tree)
                    .arg(&tree),
            )?;
            std::fs::create_dir_all(&objects)?;
            std::fs::write(&stamp, identity)?;
        }
        Ok((tree, objects))
    }

    fn configure(&self, tree: &Path, objects: &Path, step: &ui::Step) -> Result<()> {
        let mut flags: Vec<&str> = CONFIGURE.to_vec();
        // The option comes with one of the patches; those before it build without.
        let options = std::fs::read_to_string(tree.join("meson_options.txt")).unwrap_or_default();
        if options.contains("option('gmem'") {
            flags.push("--enable-gmem");
        }
        // meson remembers which version it found, and a series that wants another would not find that. Ours is the library's.
        let wanted = format!("{} gmem={}", flags.join(" "), env!("CARGO_PKG_VERSION"));
        let stamp = objects.join("configured");
        if std::fs::read_to_string(&stamp).is_ok_and(|text| text == wanted)
            && objects.join("build.ninja").exists()
        {
            return Ok(());
        }
        step.turn("configuring");
        let mut command = Command::new(tree.join("configure"));
        command
            .arg(format!("--python={}", self.python.display()))
            .args(&flags)
            .current_dir(objects);
        self.environment(&mut command);
        self.logs.run("qemu-configure", &mut command)?;
        std::fs::write(&stamp, wanted)?;
        step.turn("building");
        Ok(())
    }

    /// Later reconfigurations, which ninja starts by itself, need it as well.
    fn environment(&self, command: &mut Command) {
        if let Some(library) = &self.library {
            command.env("PKG_CONFIG_PATH", &library.pkg_config);
        }
        command.env("LC_ALL", "C.UTF-8");
    }

    pub fn meson(&self) -> PathBuf {
        self.python.with_file_name("meson")
    }

    /// For commands that run in the object folder, such as `meson test`.
    pub fn prepare_command(&self, command: &mut Command) {
        self.environment(command);
    }
}

/// A Python environment with meson, checked by hash. Made in place: environments can't be moved.
fn python_environment(cache: &Cache, logs: &Logs) -> Result<PathBuf> {
    let version = process::output(
        Command::new("python3").args(["-c", "import sys; print(sys.executable, sys.version)"]),
    )?;
    let key = Key::new("python")
        .text("requirements", REQUIREMENTS)
        .text("python", &version)
        .finish();
    let folder = cache.work("python").join(key);
    let stamp = folder.join("complete");
    if stamp.exists() {
        return Ok(folder);
    }
    let step = ui::step("meson", "fetching meson from the Python package index");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    logs.run(
        "python-venv",
        Command::new("python3").args(["-m", "venv"]).arg(&folder),
    )?;
    let requirements = folder.join("requirements.txt");
    std::fs::write(&requirements, REQUIREMENTS)?;
    let mut install = Command::new(folder.join("bin/python3"));
    install
        .args([
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "--no-input",
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "-r",
        ])
        .arg(&requirements);
    let (status, log) = logs.run_status("python-packages", &mut install, |_| ())?;
    if !status.success() {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let reason = if text.contains("DO NOT MATCH THE HASHES") {
            "what arrived has the wrong hash"
        } else {
            "the Python package index can't be reached, or it refused"
        };
        bail!(
            "can't fetch meson: {reason}; the end of {}:\n{}",
            log.display(),
            process::tail(&log, 5)
        );
    }
    std::fs::write(&stamp, "")?;
    step.done("meson fetched");
    Ok(folder)
}

/// `[12/1719] Compiling …`
fn ninja_progress(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix('[')?.split_once(']')?.0.split_once('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ninjas_counter_is_read() {
        assert_eq!(
            ninja_progress("[12/1719] Compiling C object x.o"),
            Some(("12", "1719"))
        );
        assert_eq!(ninja_progress("ninja: no work to do."), None);
    }

    #[test]
    fn every_python_package_is_pinned_by_hash() {
        for line in REQUIREMENTS.lines() {
            assert!(
                line.contains("==") && line.contains("--hash=sha256:"),
                "{line}"
            );
        }
    }
}
