// SPDX-License-Identifier: MIT OR Apache-2.0
//! What L1 and a Linux L2 boot: our own programs, and the archives that hold them.

use crate::cache::{Cache, Key};
use crate::firmware::{Firmware, IN_LAB};
use crate::initramfs::Archive;
use crate::kernel::Kernel;
use crate::process::{self, Logs};
use crate::qemu::Qemu;
use crate::tee_firmware::{self, Kind};
use crate::{tree::Tree, ui};
use anyhow::{Context, Result};
use std::io::BufWriter;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the programs of one extra scenario go, and the list of command lines that the agent runs.
pub struct Extra {
    /// Place in L1 without the leading slash, and the host's file.
    pub files: Vec<(String, PathBuf)>,
    /// Place in L1 and text.
    pub texts: Vec<(String, String)>,
    /// Place in L1, and a folder of the host's that is there as it is.
    pub folder: Option<(String, PathBuf)>,
}

/// Agent, payload and the firmware of SNP and TDX guests, as built from the tree.
pub struct Programs {
    agent: PathBuf,
    payload: PathBuf,
    /// Images, each with the payload in it.
    tee_firmware: Vec<PathBuf>,
}

impl Programs {
    pub fn agent(&self) -> &Path {
        &self.agent
    }

    pub fn payload(&self) -> &Path {
        &self.payload
    }
}

/// Builds them. cargo knows what is fresh, so this is cheap when nothing changed.
pub fn programs(cache: &Cache, logs: &Logs, tree: &Tree) -> Result<Programs> {
    let step = ui::step("agent", "building");
    let cargo = |folder: &Path, target: &str| {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        command
            .current_dir(folder)
            .env("CARGO_TARGET_DIR", cache.work(target))
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .args(["build", "--release"]);
        command
    };
    let host_target = "x86_64-unknown-linux-gnu";
    logs.run(
        "agent-build",
        cargo(tree.root(), "agent")
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .args(["--target", host_target, "--package", "gmem-lab-agent"]),
    )?;
    let built = cache.work("agent").join(host_target).join("release");
    let agent = built.join("gmem-lab-agent");
    let bare_metal = |name: &str, program: &str| -> Result<PathBuf> {
        let mut build = cargo(&tree.lab(name), name);
        logs.run(&format!("{name}-build"), build.env_remove("RUSTFLAGS"))?;
        Ok(cache.work(name).join("release").join(program))
    };
    let payload = bare_metal("payload", "gmem-lab-payload")?;
    let code = bare_metal("tee-firmware", "gmem-lab-tee-firmware")?;
    let mut tee_firmware = Vec::new();
    for kind in Kind::ALL {
        let file = cache.work("tee-firmware").join(kind.file());
        std::fs::write(&file, tee_firmware::image(kind, &code, &payload)?)
            .with_context(|| format!("can't write {}", file.display()))?;
        tee_firmware.push(file);
    }
    drop(step);
    Ok(Programs {
        agent,
        payload,
        tee_firmware,
    })
}

/// Everything that L0 needs to start L1.
pub struct Images {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// What a Linux guest in L1 boots with.
    pub l2: PathBuf,
}

/// Packs L1's and L2's archives, or finds them.
pub fn pack(
    cache: &Cache,
    kernel: &Kernel,
    qemu: &Qemu,
    firmware: &Firmware,
    programs: &Programs,
    extra: Option<&Extra>,
) -> Result<Images> {
    let mut key = Key::new("initramfs")
        .text("recipe", "1")
        .text("kernel", &kernel.key)
        .text("qemu", &qemu.key)
        .text("firmware", &firmware.key)
        .file("agent", &programs.agent)?
        .file("payload", &programs.payload)?;
    for file in &programs.tee_firmware {
        key = key.file("tee-firmware", file)?;
    }
    if let Some(extra) = extra {
        for (place, file) in &extra.files {
            key = key.file(place, file)?;
        }
        for (place, text) in &extra.texts {
            key = key.text(place, text);
        }
        if let Some((place, folder)) = &extra.folder {
            // A product of the cache's: its name says what is in it.
            key = key.text(place, &folder.to_string_lossy());
        }
    }
    let product = cache.product("initramfs", &key.finish(), |folder| {
        let mut l2 = base();
        l2.file("init", 0o755, &programs.agent)?;
        let l2_path = folder.join("l2.cpio");
        write(&l2, &l2_path)?;

        let mut l1 = base();
        l1.file("init", 0o755, &programs.agent)?;
        add_busybox(&mut l1, &firmware.busybox)?;
        l1.file("lab/qemu-system-x86_64", 0o755, &qemu.binary)?;
        add_libraries(&mut l1, &qemu.binary)?;
        l1.file("lab/qemu-storage-daemon", 0o755, &qemu.storage_daemon)?;
        add_libraries(&mut l1, &qemu.storage_daemon)?;
        for name in IN_LAB {
            l1.file(
                &format!("lab/share/{name}"),
                0o644,
                &firmware.share.join(name),
            )?;
        }
        l1.file("lab/l2/bzImage", 0o644, &kernel.image)?;
        l1.file("lab/l2/initramfs", 0o644, &l2_path)?;
        l1.file("lab/l2/payload.elf", 0o644, &programs.payload)?;
        for (kind, file) in Kind::ALL.iter().zip(&programs.tee_firmware) {
            l1.file(&format!("lab/l2/{}", kind.file()), 0o644, file)?;
        }
        if let Some(extra) = extra {
            for (place, file) in &extra.files {
                l1.file(place, 0o755, file)?;
                add_libraries(&mut l1, file)?;
            }
            for (place, text) in &extra.texts {
                l1.bytes(place, 0o644, text.clone().into_bytes());
            }
            if let Some((place, folder)) = &extra.folder {
                add_folder(&mut l1, place, folder)?;
            }
        }
        write(&l1, &folder.join("l1.cpio"))
    })?;
    Ok(Images {
        kernel: kernel.image.clone(),
        initramfs: product.join("l1.cpio"),
        l2: product.join("l2.cpio"),
    })
}

fn base() -> Archive {
    let mut archive = Archive::new();
    for folder in ["dev", "proc", "sys", "tmp", "run", "root"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.device("dev/null", 1, 3);
    archive
}

fn write(archive: &Archive, path: &Path) -> Result<()> {
    let file =
        std::fs::File::create(path).with_context(|| format!("can't write {}", path.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    archive.write(&mut out)?;
    std::io::Write::flush(&mut out)?;
    Ok(())
}

fn add_busybox(archive: &mut Archive, busybox: &Path) -> Result<()> {
    archive.file("bin/busybox", 0o755, busybox)?;
    for applet in process::output(Command::new(busybox).arg("--list"))?.lines() {
        if applet != "busybox" {
            archive.link(&format!("bin/{applet}"), "busybox");
        }
    }
    Ok(())
}

/// All files below, with their permissions.
fn add_folder(archive: &mut Archive, place: &str, folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let place = format!("{place}/{name}");
        match path.is_dir() {
            true => add_folder(archive, &place, &path)?,
            false => {
                let mode = path.metadata()?.permissions().mode() & 0o777;
                archive.file(&place, mode, &path)?;
            }
        }
    }
    Ok(())
}

/// Shared libraries of a program, at the places where its loader looks for them.
fn add_libraries(archive: &mut Archive, program: &Path) -> Result<()> {
    for path in libraries_of(program)? {
        let place = path.to_string_lossy();
        archive.file(place.trim_start_matches('/'), 0o755, &path)?;
    }
    Ok(())
}

/// Shared libraries of a program on this machine, and the loader.
pub fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let text = process::output(Command::new("ldd").arg(program))?;
    Ok(libraries(&text).into_iter().map(PathBuf::from).collect())
}

/// Paths in ldd's output: behind `=>`, or alone for the loader.
fn libraries(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| {
            let line = line.split(" (0x").next()?.trim();
            let path = line.split_once("=> ").map_or(line, |(_, path)| path);
            path.starts_with('/').then(|| path.to_string())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldds_output_gives_libraries_and_the_loader() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f00)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f11)\n";
        assert_eq!(
            libraries(text),
            [
                "/lib/x86_64-linux-gnu/libz.so.1",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
        assert!(libraries("\tstatically linked\n").is_empty());
    }
}
