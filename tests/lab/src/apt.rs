// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packages of Debian suites that this machine does not follow, from the mirror that it does follow.
//!
//! Everything is below the cache: own list of suites, own index files. The machine's apt configuration is read (for the
//! mirror's address, proxies and keys) and never changed. None of this needs root.

use crate::cache::{self, Cache};
use crate::process::{self, Logs};
use crate::{ui, version};
use anyhow::{anyhow, bail, Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Newest last: where kernel sources, QEMU and firmware of the right age have been found.
const SUITES: [&str; 5] = [
    "bookworm-backports",
    "trixie",
    "trixie-backports",
    "forky",
    "sid",
];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const INDEX_AGE: Duration = Duration::from_secs(24 * 3600);

pub struct Apt {
    configuration: PathBuf,
    base: String,
    downloads: PathBuf,
    logs: Logs,
}

/// One file of a source package.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceFile {
    pub name: String,
    pub sha256: String,
}

/// One version of a source package.
#[derive(Clone, Debug, PartialEq)]
pub struct SourcePackage {
    pub version: String,
    /// Below the mirror's base address.
    pub directory: String,
    pub files: Vec<SourceFile>,
}

impl Apt {
    /// Sets up the private root and fetches the suites' indexes if they are missing or older than a day.
    pub fn open(cache: &Cache, logs: &Logs) -> Result<Apt> {
        if !process::on_path("apt-get") {
            bail!(
                "there is no apt-get here, and the lab fetches sources and firmware through it; run it on Debian 12 or \
                 later (a container will do)"
            );
        }
        let base = base_address(logs)?;
        let root = cache.root().join("apt");
        for folder in ["etc", "state/lists/partial", "cache/archives/partial"] {
            std::fs::create_dir_all(root.join(folder))
                .with_context(|| format!("can't create {}", root.join(folder).display()))?;
        }
        let signed = if Path::new(KEYRING).exists() {
            format!(" [signed-by={KEYRING}]")
        } else {
            String::new()
        };
        let list: String = SUITES
            .iter()
            .flat_map(|suite| {
                ["deb", "deb-src"].map(|kind| format!("{kind}{signed} {base} {suite} main\n"))
            })
            .collect();
        let stale = write_if_changed(&root.join("etc/sources.list"), &list)?;
        let configuration = root.join("apt.conf");
        let at = |path: &str| root.join(path).display().to_string();
        write_if_changed(
            &configuration,
            &format!(
                "Dir::State \"{}\";\nDir::State::status \"/var/lib/dpkg/status\";\nDir::Cache \"{}\";\n\
                 Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"/dev/null\";\nAcquire::Languages \"none\";\n\
                 Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
                 Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled \"false\";\nAPT::Sandbox::User \"\";\n\
                 Acquire::Retries \"3\";\n",
                at("state"),
                at("cache"),
                at("etc/sources.list"),
            ),
        )?;
        let apt = Apt {
            configuration,
            base,
            downloads: cache.downloads(),
            logs: logs.clone(),
        };
        let stamp = root.join("updated");
        let fresh = std::fs::metadata(&stamp)
            .and_then(|data| data.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age < INDEX_AGE));
        if stale || !fresh {
            apt.update()?;
            std::fs::write(&stamp, "")?;
        }
        Ok(apt)
    }

    fn update(&self) -> Result<()> {
        let step = ui::step("apt", "reading the mirror's indexes");
        let mut command = self.command("apt-get");
        command.arg("update");
        let (status, log) = self.logs.run_status("apt-indexes", &mut command, |_| ())?;
        // One suite that the mirror lacks or that this machine has no key for leaves the others useful. And without a
        // network at all apt only warns, so its status alone says little.
        let text = read(&log);
        let trouble = !status.success() || network_trouble(&text).is_some();
        if trouble && self.versions("seabios")?.is_empty() {
            bail!("{}", explain("apt-get update", &log));
        }
        step.done("indexes read");
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.configuration);
        command.env("LC_ALL", "C.UTF-8");
        command
    }

    /// Versions of a binary package in all suites, newest first.
    pub fn versions(&self, package: &str) -> Result<Vec<String>> {
        let text = process::output(self.command("apt-cache").args(["madison", package]))?;
        Ok(parse_madison(&text, package))
    }

    /// Versions of a source package in all suites, newest first.
    pub fn sources(&self, package: &str) -> Result<Vec<SourcePackage>> {
        let mut command = self.command("apt-cache");
        command.args(["showsrc", "--only-source", package]);
        // An unknown package is an error to apt, an empty list here: known versions may still be had.
        Ok(parse_sources(
            &process::output(&mut command).unwrap_or_default(),
        ))
    }

    /// Fetches the newest version that fits and that the mirror really serves.
    pub fn newest_package(
        &self,
        package: &str,
        fits: impl Fn(&str) -> bool,
    ) -> Result<(String, PathBuf)> {
        let versions: Vec<String> = (self.versions(package)?.into_iter())
            .filter(|version| fits(version))
            .collect();
        if versions.is_empty() {
            bail!(
                "no suite of the mirror has a fitting {package} (looked in {})",
                SUITES.join(", ")
            );
        }
        let mut refusals = Vec::new();
        for version in &versions {
            match self.package(package, version) {
                Ok(path) => return Ok((version.clone(), path)),
                Err(error) => {
                    crate::interrupt::check()?;
                    refusals.push(format!("{version}: {error}"));
                }
            }
        }
        bail!(
            "the mirror lists {package} but does not serve it: {}",
            refusals.join("; ")
        )
    }

    fn package(&self, package: &str, version: &str) -> Result<PathBuf> {
        let escaped = version.replace(':', "%3a");
        let prefix = format!("{package}_{escaped}_");
        let there = |folder: &Path| -> Option<PathBuf> {
            let listing = std::fs::read_dir(folder).ok()?;
            listing.flatten().map(|entry| entry.path()).find(|path| {
                (path.file_name().and_then(|name| name.to_str()))
                    .is_some_and(|name| name.starts_with(&prefix) && name.ends_with(".deb"))
            })
        };
        if let Some(path) = there(&self.downloads) {
            return Ok(path);
        }
        let folder = self.downloads.join(format!("{package}.part"));
        std::fs::create_dir_all(&folder)?;
        let name = format!("apt-{package}");
        let mut command = self.command("apt-get");
        command
            .arg("download")
            .arg(format!("{package}={version}"))
            .current_dir(&folder);
        let (status, log) = self.logs.run_status(&name, &mut command, |_| ())?;
        // apt has checked it against the signed index before it gives it this name.
        let Some(path) = there(&folder).filter(|_| status.success()) else {
            bail!("{}", explain(&format!("fetching {package}"), &log));
        };
        let place = self.downloads.join(path.file_name().unwrap_or_default());
        std::fs::rename(&path, &place)?;
        let _ = std::fs::remove_dir_all(&folder);
        Ok(place)
    }

    /// Fetches a file by its place below the mirror's address and checks its hash.
    pub fn file(&self, directory: &str, file: &SourceFile) -> Result<PathBuf> {
        let place = self.downloads.join(&file.name);
        if place.exists() && cache::sha256_of(&place)? == file.sha256 {
            return Ok(place);
        }
        let helper = Path::new("/usr/lib/apt/apt-helper");
        if !helper.exists() {
            bail!("apt-helper, a part of apt, is missing from its usual place");
        }
        let part = self.downloads.join(format!("{}.part", file.name));
        let mut command = Command::new(helper);
        command
            .arg("-c")
            .arg(&self.configuration)
            .args(["-o", "APT::Sandbox::User=", "download-file"])
            .arg(format!(
                "{}/{directory}/{}",
                self.base.trim_end_matches('/'),
                file.name
            ))
            .arg(&part)
            .arg(format!("SHA256:{}", file.sha256))
            .env("LC_ALL", "C.UTF-8");
        let name = format!("fetch-{}", file.name);
        let (status, log) = self.logs.run_status(&name, &mut command, |_| ())?;
        if !status.success() {
            // A half-fetched file is resumed; one that is whole and wrong would be refused for ever.
            if read(&log).contains("Hash Sum mismatch") {
                let _ = std::fs::remove_file(&part);
            }
            bail!("{}", explain(&format!("fetching {}", file.name), &log));
        }
        let found = cache::sha256_of(&part)?;
        if found != file.sha256 {
            std::fs::remove_file(&part)?;
            bail!(
                "{} arrived with the wrong contents (SHA-256 {found}, expected {}); it was thrown away",
                file.name,
                file.sha256
            );
        }
        std::fs::rename(&part, &place)?;
        Ok(place)
    }
}

/// The address of the Debian archive that this machine uses.
fn base_address(logs: &Logs) -> Result<String> {
    let ask = || -> Result<Option<String>> {
        let text = process::output(
            Command::new("apt-get")
                .args(["indextargets", "--format", "$(REPO_URI)|$(ORIGIN)|$(LABEL)"])
                .env("LC_ALL", "C.UTF-8"),
        )?;
        Ok(parse_base(&text))
    };
    if let Some(base) = ask()? {
        return Ok(base);
    }
    // A fresh image has no index files, and only they say whose archive it is.
    if !crate::host::is_root() {
        bail!(
            "apt knows no Debian archive; run `apt-get update` as root first (and see that its sources name Debian's \
             main archive), or give sources with --kernel-src and --qemu-src"
        );
    }
    let step = ui::step("apt", "apt-get update");
    let mut command = Command::new("apt-get");
    command.arg("update").env("LC_ALL", "C.UTF-8");
    let (_, log) = logs.run_status("apt-update", &mut command, |_| ())?;
    step.done("apt-get update");
    ask()?.ok_or_else(|| {
        let text = read(&log);
        match network_trouble(&text) {
            Some(trouble) => anyhow!("{trouble}; see {}", log.display()),
            None => anyhow!(
                "apt's sources on this machine name no Debian archive, and the lab takes kernel sources, QEMU sources \
                 and firmware from there; run it on Debian 12 or later (a container will do)"
            ),
        }
    })
}

fn parse_base(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let mut fields = line.split('|');
        let (base, origin, label) = (fields.next()?, fields.next()?, fields.next()?);
        (origin == "Debian" && label == "Debian").then(|| base.to_string())
    })
}

fn parse_madison(text: &str, package: &str) -> Vec<String> {
    let mut versions: Vec<String> = text
        .lines()
        .filter(|line| !line.trim_end().ends_with("Sources"))
        .filter_map(|line| {
            let mut fields = line.split('|').map(str::trim);
            (fields.next()? == package).then(|| fields.next().map(str::to_string))?
        })
        .collect();
    versions.sort_by(|left, right| version::compare(right, left));
    versions.dedup();
    versions
}

fn parse_sources(text: &str) -> Vec<SourcePackage> {
    let mut found: Vec<SourcePackage> = Vec::new();
    for paragraph in text.split("\n\n") {
        let (mut version, mut directory, mut files) = (None, None, Vec::new());
        let mut in_hashes = false;
        for line in paragraph.lines() {
            if let Some(rest) = line.strip_prefix(' ') {
                let mut words = rest.split_whitespace();
                if let (true, Some(sha256), Some(_), Some(name)) =
                    (in_hashes, words.next(), words.next(), words.next())
                {
                    files.push(SourceFile {
                        name: name.to_string(),
                        sha256: sha256.to_string(),
                    });
                }
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            in_hashes = field == "Checksums-Sha256";
            match field {
                "Version" => version = Some(value.trim().to_string()),
                "Directory" => directory = Some(value.trim().to_string()),
                _ => (),
            }
        }
        if let (Some(version), Some(directory), false) = (version, directory, files.is_empty()) {
            let package = SourcePackage {
                version,
                directory,
                files,
            };
            if !found.contains(&package) {
                found.push(package);
            }
        }
    }
    found.sort_by(|left, right| version::compare(&right.version, &left.version));
    found
}

/// What a failed fetch means for the user.
pub fn explain(what: &str, log: &Path) -> String {
    let text = read(log);
    if let Some(trouble) = network_trouble(&text) {
        return format!("{what}: {trouble}");
    }
    let reason = if text.contains("404") {
        "the mirror lists it but answers 404 (not found)".to_string()
    } else if text.contains("Hash Sum mismatch") || text.contains("Hashes of expected file") {
        "what arrived has the wrong hash and was thrown away".to_string()
    } else if text.contains("No space left") {
        "the disk is full".to_string()
    } else if text.contains("Could not get lock") || text.contains("Unable to lock") {
        "another package manager is at work; wait for it and try again".to_string()
    } else {
        let errors: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("E:") || line.starts_with("Err:"))
            .collect();
        match errors.last() {
            Some(error) => error.to_string(),
            None => process::tail(log, 3),
        }
    };
    format!("{what}: {reason} (log: {})", log.display())
}

fn network_trouble(text: &str) -> Option<String> {
    let signs = [
        "Temporary failure resolving",
        "Could not resolve",
        "Could not connect",
        "Network is unreachable",
        "Connection timed out",
        "Unable to connect",
        "Connection refused",
    ];
    let line = text
        .lines()
        .find(|line| signs.iter().any(|sign| line.contains(sign)))?;
    let line = line.trim_start_matches(['E', 'W', ':', ' ']);
    Some(format!(
        "the package mirror can't be reached (no network?): {line}"
    ))
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

fn write_if_changed(path: &Path, text: &str) -> Result<bool> {
    if std::fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(false);
    }
    std::fs::write(path, text).with_context(|| format!("can't write {}", path.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_debians_main_archive() {
        let text = "http://m/debian-security/|Debian|Debian-Security\nhttp://x/|Other|Debian\nhttp://m/debian/|Debian|Debian\n";
        assert_eq!(parse_base(text).as_deref(), Some("http://m/debian/"));
        assert_eq!(parse_base("http://m/|$(ORIGIN)|$(LABEL)\n"), None);
    }

    #[test]
    fn madison_is_read_newest_first_without_sources() {
        let text = "\
linux-source-7.3 | 7.3.3-1 | http://m/debian sid/main amd64 Packages
linux-source-7.3 | 7.3.10-1~bpo13+1 | http://m/debian trixie-backports/main amd64 Packages
linux-source-7.3 | 7.3.3-1 | http://m/debian forky/main amd64 Packages
     linux | 7.3.99-1 | http://m/debian trixie-backports/main Sources
";
        assert_eq!(
            parse_madison(text, "linux-source-7.3"),
            ["7.3.10-1~bpo13+1", "7.3.3-1"]
        );
    }

    #[test]
    fn sources_are_read_with_their_sha256_alone() {
        let text = "\
Package: qemu
Version: 1:11.1.1+ds-1
Files:
 0123 11 qemu_11.1.1+ds.orig.tar.xz
Checksums-Sha256:
 abcd 11 qemu_11.1.1+ds.orig.tar.xz
 ef01 22 qemu_11.1.1+ds-1.debian.tar.xz
Directory: pool/main/q/qemu

Package: qemu
Version: 1:11.1.2+ds-1
Directory: pool/main/q/qemu
Checksums-Sha256:
 2222 33 qemu_11.1.2+ds.orig.tar.xz
";
        let found = parse_sources(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].version, "1:11.1.2+ds-1");
        assert_eq!(found[1].files.len(), 2);
        assert_eq!(
            found[1].files[0],
            SourceFile {
                name: "qemu_11.1.1+ds.orig.tar.xz".into(),
                sha256: "abcd".into()
            }
        );
        assert_eq!(found[1].directory, "pool/main/q/qemu");
    }

    #[test]
    fn no_network_is_told_apart_from_a_refusal() {
        assert!(network_trouble("Err:1 x\n  Temporary failure resolving 'm'\n").is_some());
        assert!(network_trouble("Err:1 x\n  404  Not Found\n").is_none());
    }
}
