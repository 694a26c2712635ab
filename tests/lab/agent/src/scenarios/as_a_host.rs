// SPDX-License-Identifier: MIT OR Apache-2.0
//! The folder of `cargo lab host`, unpacked on this machine as on somebody's: `gmem-host` runs there without any file of the
//! lab's, refuses what is to be refused, gives back what it took, also when it is interrupted, and reports.

use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::engine::OwnEngine;
use crate::host::passthrough::{to_driver, to_vfio, EDU, NVME};
use crate::host::{kernel, tee};
use crate::monitor::protocol::READY;
use crate::place;
use crate::scenario::{Outcome, Scenario};
use serde_json::Value;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const FOLDER: &str = "/opt/gmem host";
const PROGRAM: &str = "gmem-host";
/// What of this machine the program does not get to see.
const HIDDEN: [&str; 5] = ["/lab", "/lib", "/lib64", "/usr", "/bin"];
const DISK: &str = "/dev/nvme0n1";
const NVME_DRIVER: &str = "nvme";
const PATIENCE: Duration = Duration::from_secs(900);
/// What a host is tried with: each kind of guest, and each kind of device.
const RUN: &[&str] = &[
    "ordinary-small",
    "ordinary-payload",
    "timings",
    "device",
    "device-disk",
    "confidential-convert",
    "system-reset",
];

/// Of those, what depends on how the kernel converts, and the least of the others.
const RUN_IN_PLACE: &[&str] = &[
    "ordinary-small",
    "timings",
    "confidential-convert",
    "system-reset",
];

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let nvme = to_driver(&NVME, NVME_DRIVER)?;
    wait_for_disk()?;
    let edu = to_vfio(&EDU)?;
    nothing_is_done(scenario, &nvme, &edu)?;
    all_of_it(scenario, &nvme, &edu)?;
    silicon(scenario)?;
    if kernel::in_place() {
        return Ok(());
    }
    interrupted(scenario, &nvme)?;
    one_that_dies(scenario, &nvme)
}

/// One run of the program.
struct Run {
    child: Child,
    said: PathBuf,
}

/// How it ended.
struct End {
    status: Option<i32>,
    said: String,
}

/// Where and as whom it runs.
#[derive(Clone, Copy, Default)]
struct Place {
    nobody: bool,
    /// Without /dev.
    bare: bool,
}

impl Run {
    fn start(scenario: &Scenario, place: Place, arguments: &[&str]) -> Result<Self, Failure> {
        let directory = scenario.directory();
        let said = directory.join("said");
        let file = File::create(&said).attempt(|| format!("creating {}", said.display()))?;
        let error = file.try_clone().attempt(|| "duplicating a file".into())?;
        let mut command = Command::new(format!("{FOLDER}/{PROGRAM}"));
        command
            .args(arguments)
            .current_dir(directory)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(error);
        let hidden: Vec<CString> = HIDDEN
            .iter()
            .chain(place.bare.then_some(&"/dev"))
            .filter_map(|path| CString::new(*path).ok())
            .collect();
        // SAFETY: only system calls between fork and exec, on strings that were made before.
        unsafe {
            command.pre_exec(move || {
                hide(&hidden)?;
                if place.nobody && (libc::setgid(65534) != 0 || libc::setuid(65534) != 0) {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        println!("agent: {command:?}");
        let child = command.spawn().attempt(|| format!("starting {PROGRAM}"))?;
        Ok(Self { child, said })
    }

    fn end(mut self) -> Result<End, Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().attempt(|| "waiting".into())? {
                let said = fs::read_to_string(&self.said).unwrap_or_default();
                println!("{said}");
                return Ok(End {
                    status: status.code(),
                    said,
                });
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                return Err(Failure::new(format!("{PROGRAM} does not end")));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// In the child: a mount namespace in which these folders are empty.
fn hide(folders: &[CString]) -> io::Result<()> {
    let check = |result: libc::c_int| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    let (root, none) = (c"/".as_ptr(), std::ptr::null());
    // SAFETY: strings that end with NUL and outlive the calls; a null data pointer means no options.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS))?;
        check(libc::mount(
            none,
            root,
            none,
            libc::MS_REC | libc::MS_PRIVATE,
            none.cast(),
        ))?;
        for folder in folders {
            let kind = c"tmpfs".as_ptr();
            let result = libc::mount(kind, folder.as_ptr(), kind, 0, none.cast());
            if result != 0 && *libc::__errno_location() != libc::ENOENT {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

fn once(scenario: &Scenario, arguments: &[&str]) -> Result<End, Failure> {
    Run::start(scenario, Place::default(), arguments)?.end()
}

/// It ends with 2 and this sentence, and no report is there.
fn refused(scenario: &mut Scenario, what: &str, end: &End, words: &[&str]) -> Outcome {
    let line = end.said.lines().last().unwrap_or_default();
    scenario.fact(what, line);
    scenario.check(
        end.status == Some(2) && words.iter().all(|word| line.contains(word)),
        format!(
            "{what}: ends with 2 and says {words:?} ({:?}: {line})",
            end.status
        ),
    )?;
    scenario.check(
        !scenario.directory().join("gmem-host-report.json").exists(),
        format!("{what}: no report is left"),
    )
}

fn nothing_is_done(scenario: &mut Scenario, nvme: &str, edu: &str) -> Outcome {
    let before = State::now()?;
    let end = once(scenario, &["--list"])?;
    scenario.check(
        end.status == Some(0) && end.said.contains("confidential-convert     would run"),
        format!("--list says what would run: {}", end.said),
    )?;
    let end = once(scenario, &["--devise", nvme])?;
    refused(scenario, "an option that there is not", &end, &["--devise"])?;
    let end = once(scenario, &["--only", "dumb"])?;
    refused(
        scenario,
        "a scenario that there is not",
        &end,
        &["dumb", "--list"],
    )?;
    let nobody = Place {
        nobody: true,
        ..Place::default()
    };
    let end = Run::start(scenario, nobody, &[])?.end()?;
    refused(scenario, "not root", &end, &["root", "65534"])?;
    let bare = Place {
        bare: true,
        ..Place::default()
    };
    let end = Run::start(scenario, bare, &[])?.end()?;
    refused(
        scenario,
        "no /dev/kvm",
        &end,
        &["/dev/kvm", "No such file", "modprobe kvm_amd"],
    )?;
    let end = once(scenario, &["--device", "0000:7f:1f.7", "--yes"])?;
    refused(scenario, "no such device", &end, &["0000:7f:1f.7", "lspci"])?;
    let end = once(scenario, &["--device", "eth0", "--yes"])?;
    refused(scenario, "no PCI address", &end, &["eth0"])?;
    let end = once(scenario, &["--device", "0000:00:1f.0", "--yes"])?;
    refused(scenario, "a bridge", &end, &["0000:00:1f.0", "bridge"])?;
    let end = once(scenario, &["--device", nvme, "--only", "device"])?;
    refused(scenario, "nobody to ask", &end, &["--yes"])?;
    {
        let disk = File::options()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(DISK);
        let _disk = disk.attempt(|| format!("claiming {DISK}"))?;
        let end = once(scenario, &["--device", nvme, "--yes"])?;
        refused(
            scenario,
            "a disk in use",
            &end,
            &[nvme, "in use", "nvme0n1"],
        )?;
    }
    {
        let _engine = OwnEngine::open(edu)?;
        let end = once(scenario, &["--device", edu, "--yes"])?;
        let here = std::process::id().to_string();
        refused(
            scenario,
            "a device that a process has open",
            &end,
            &[edu, "in use", &here],
        )?;
    }
    let end = once(scenario, &["--firmware", "/no/such/OVMF.fd"])?;
    refused(
        scenario,
        "firmware where there is neither SNP nor TDX",
        &end,
        &["neither SNP nor TDX"],
    )?;
    no_space(scenario)?;
    broken_folder(scenario)?;
    let report = scenario.directory().join("gmem-host-report.txt");
    fs::write(&report, "mine").attempt(|| "writing a report".into())?;
    let end = once(scenario, &["--only", "ordinary-payload"])?;
    refused(
        scenario,
        "a report that is there",
        &end,
        &["exists", "--report"],
    )?;
    let kept = fs::read_to_string(&report).unwrap_or_default();
    scenario.check_equal(kept.as_str(), "mine", "what the report that was there says")?;
    let _ = fs::remove_file(&report);
    before.holds(scenario, "after all refusals")
}

/// Small file systems for work and for the report.
fn no_space(scenario: &mut Scenario) -> Outcome {
    let small = scenario.directory().join("small");
    let path = small.to_string_lossy().into_owned();
    fs::create_dir_all(&small).attempt(|| format!("creating {path}"))?;
    let name = CString::new(path.as_str()).attempt(|| "a path".into())?;
    // SAFETY: strings that end with NUL and outlive the call.
    let result = unsafe {
        libc::mount(
            c"tmpfs".as_ptr(),
            name.as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            c"size=64k".as_ptr().cast(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).attempt(|| format!("mounting {path}"));
    }
    let end = once(scenario, &["--work", &path])
        .and_then(|end| refused(scenario, "no space to work", &end, &["MiB left", "--work"]));
    let report = format!("{path}/report");
    let end = end.and_then(|()| {
        let end = once(
            scenario,
            &["--report", &report, "--only", "ordinary-payload"],
        )?;
        refused(
            scenario,
            "no space for the report",
            &end,
            &["No space left", "--report"],
        )
    });
    // SAFETY: as above.
    unsafe { libc::umount(name.as_ptr()) };
    end
}

/// A file that is missing, one that was cut off, one that lost its permissions.
fn broken_folder(scenario: &mut Scenario) -> Outcome {
    let library = Path::new(FOLDER).join("lib/libz.so.1");
    let away = Path::new(FOLDER).join("away");
    let rename =
        |from: &Path, to: &Path| fs::rename(from, to).attempt(|| "renaming a library".into());
    rename(&library, &away)?;
    let end = once(scenario, &["--list"])?;
    refused(
        scenario,
        "a folder that lacks a library",
        &end,
        &["libz.so.1", "copy the whole folder"],
    )?;
    fs::write(&library, "").attempt(|| "writing a library".into())?;
    let end = once(scenario, &["--list"])?;
    refused(
        scenario,
        "a folder with half a library",
        &end,
        &["libz.so.1", "copy it again"],
    )?;
    rename(&away, &library)
}

/// The devices' drivers, pools, and who runs.
#[derive(Clone, Debug, PartialEq)]
struct State {
    drivers: Vec<(String, String, String)>,
    pools: Vec<String>,
    mounts: String,
    guests: usize,
    left_in_tmp: Vec<String>,
}

impl State {
    fn now() -> Result<Self, Failure> {
        let mut drivers: Vec<_> = fs::read_dir("/sys/bus/pci/devices")
            .attempt(|| "reading PCI devices".into())?
            .flatten()
            .map(|entry| {
                let driver = fs::read_link(entry.path().join("driver"));
                let text = driver
                    .map(|path| path.display().to_string())
                    .unwrap_or_default();
                let overridden = fs::read_to_string(entry.path().join("driver_override"));
                (
                    entry.file_name().to_string_lossy().into_owned(),
                    text,
                    overridden.unwrap_or_default(),
                )
            })
            .collect();
        drivers.sort();
        let pools = ["2048", "1048576"].map(|kib| {
            let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages");
            fs::read_to_string(path).unwrap_or_default()
        });
        let tmp = fs::read_dir("/tmp").attempt(|| "reading /tmp".into())?;
        Ok(Self {
            drivers,
            pools: pools.to_vec(),
            mounts: fs::read_to_string("/proc/self/mounts").unwrap_or_default(),
            guests: processes("").len(),
            left_in_tmp: tmp
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .filter(|name| name.starts_with("gmem-host"))
                .collect(),
        })
    }

    fn holds(&self, scenario: &Scenario, when: &str) -> Outcome {
        scenario.check_equal(
            Self::now()?,
            Self {
                guests: 0,
                left_in_tmp: Vec::new(),
                ..self.clone()
            },
            format!("this machine is as it was {when}"),
        )
    }
}

/// Processes of the folder's that are there, and that have this word in their command line.
fn processes(word: &str) -> Vec<u32> {
    let has = |line: &[u8], word: &str| {
        let word = word.as_bytes();
        word.is_empty() || line.windows(word.len()).any(|window| window == word)
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let number = entry.file_name().to_str()?.parse().ok()?;
            (has(&line, FOLDER) && has(&line, word)).then_some(number)
        })
        .collect()
}

/// Whether a process of the folder's has a device open through VFIO.
fn has_device_open() -> bool {
    let files = |process: u32| {
        fs::read_dir(format!("/proc/{process}/fd"))
            .into_iter()
            .flatten()
    };
    let targets = processes("").into_iter().flat_map(files).flatten();
    targets
        .filter_map(|file| fs::read_link(file.path()).ok())
        .any(|target| target.starts_with("/dev/vfio/devices"))
}

fn send(process: u32, signal: libc::c_int) -> Result<(), Failure> {
    // SAFETY: numbers only.
    match unsafe { libc::kill(process as libc::pid_t, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error())
            .attempt(|| format!("signal {signal} to process {process}")),
    }
}

fn report(scenario: &Scenario) -> Result<Value, Failure> {
    let path = scenario.directory().join("gmem-host-report.json");
    let text = fs::read_to_string(&path).attempt(|| format!("reading {}", path.display()))?;
    for ending in ["json", "txt", "log"] {
        let _ = fs::remove_file(path.with_extension(ending));
    }
    serde_json::from_str(&text).attempt(|| "the report is no JSON".into())
}

fn all_of_it(scenario: &mut Scenario, nvme: &str, edu: &str) -> Outcome {
    let before = State::now()?;
    let run = match kernel::in_place() {
        true => RUN_IN_PLACE,
        false => RUN,
    };
    let names = run.join(",");
    let end = once(
        scenario,
        &[
            "--yes",
            "--device",
            nvme,
            "--device",
            edu,
            "--cpu",
            "host,tsc-deadline=off",
            "--only",
            &names,
        ],
    )?;
    let text =
        fs::read_to_string(scenario.directory().join("gmem-host-report.txt")).unwrap_or_default();
    println!("{text}");
    let report = report(scenario)?;
    for row in report["scenarios"].as_array().into_iter().flatten() {
        let name = row["name"].as_str().unwrap_or("?");
        scenario.fact(name, row["result"].clone());
        scenario.check(
            row["result"] == "passed",
            format!("{name} passes on this host: {row}"),
        )?;
    }
    scenario.check_equal(
        report["passed"].as_u64(),
        Some(run.len() as u64),
        "scenarios that passed on this host",
    )?;
    scenario.check_equal(end.status, Some(0), "the program's exit status")?;
    scenario.check_equal(
        report["left_changed"].as_array().map(Vec::len),
        Some(0),
        "things that it says it left changed",
    )?;
    let back = |device: &Value| device["given_back"] == true;
    let devices = report["devices"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    scenario.check(
        devices.len() == 2 && devices.iter().all(back),
        format!("both devices are given back: {devices:?}"),
    )?;
    let host = &report["host"];
    scenario.check_equal(
        host["converts_in_place"].as_bool(),
        Some(kernel::in_place()),
        "whether it says that this kernel converts in place",
    )?;
    scenario.check(
        host["iommufd"] == true
            && host["vfio_pci"] == true
            && host["vm_types"].to_string().contains("sw-protected"),
        format!("it finds what this host has: {host}"),
    )?;
    let ratios = &report["scenarios"][1]["facts"]["ratios"];
    scenario.fact("ratios", ratios.clone());
    scenario.check(
        ratios.as_object().is_some_and(|ratios| ratios.len() >= 4),
        format!("timings are ratios: {ratios}"),
    )?;
    scenario.check(
        text.contains(&format!("{} passed, 0 failed, 0 skipped", run.len()))
            && text.contains("The host is as it was."),
        "the text says the same",
    )?;
    wait_for_disk()?;
    before.holds(scenario, "after a run")
}

/// Guests of SNP and of TDX by the kernel's stand-in, as people have theirs booted: with a file of firmware, and what they say when
/// they are up.
fn silicon(scenario: &mut Scenario) -> Outcome {
    if !kernel::is_the_labs() {
        scenario.fact("SNP and TDX", "this kernel has no stand-in for them");
        return Ok(());
    }
    for (kind, other, bit) in [("snp", "tdx", tee::SNP), ("tdx", "snp", tee::TDX)] {
        let _offered = tee::Offered::kinds(bit)?;
        let before = State::now()?;
        let firmware = scenario.directory().join(format!("{kind} firmware.fd"));
        fs::copy(place::file(&format!("l2/{kind}.fd")), &firmware)
            .attempt(|| format!("copying the firmware of {kind}"))?;
        let firmware = firmware.to_string_lossy();
        let end = once(scenario, &["--firmware", "/no/such/OVMF.fd"])?;
        let what = format!("{kind}: firmware that is not there");
        refused(scenario, &what, &end, &["--firmware", "No such file"])?;
        let end = once(scenario, &["--firmware", &firmware, "--kind", other])?;
        let what = format!("{kind}: firmware of {other}");
        refused(scenario, &what, &end, &["--kind", other])?;
        let end = once(
            scenario,
            &[
                "--firmware",
                &firmware,
                "--until",
                READY,
                "--cpu",
                "host,tsc-deadline=off",
                "--only",
                "confidential-image",
            ],
        )?;
        let report = report(scenario)?;
        let row = &report["scenarios"][0];
        scenario.fact(kind, row["facts"].clone());
        scenario.check(
            end.status == Some(0) && row["result"] == "passed" && row["facts"]["kind"] == kind,
            format!("a guest of {kind} is up on this host: {row}"),
        )?;
        scenario.check(
            kernel::in_place() || row["facts"]["ratios"].is_object(),
            format!("{kind}: memory-backend-memfd can do that as well: {row}"),
        )?;
        before.holds(scenario, &format!("after a guest of {kind}"))?;
    }
    Ok(())
}

/// Waits until guests have the device, for what happens then.
fn with_device(scenario: &Scenario, nvme: &str) -> Result<Run, Failure> {
    let mut run = Run::start(
        scenario,
        Place::default(),
        &[
            "--yes",
            "--device",
            nvme,
            "--cpu",
            "host,tsc-deadline=off",
            "--only",
            "device,device-disk",
        ],
    )?;
    let driver = format!("/sys/bus/pci/devices/{nvme}/driver");
    let deadline = Instant::now() + PATIENCE;
    // QEMU has it, not only vfio-pci.
    while !has_device_open() || !fs::read_link(&driver).is_ok_and(|path| path.ends_with("vfio-pci"))
    {
        if run.child.try_wait().attempt(|| "waiting".into())?.is_some() || Instant::now() > deadline
        {
            return Err(Failure::new(format!(
                "no guest got the device: {}",
                run.end()?.said
            )));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(run)
}

/// Ctrl-C while a guest has the device.
fn interrupted(scenario: &mut Scenario, nvme: &str) -> Outcome {
    for (name, signal) in [("SIGINT", libc::SIGINT), ("SIGTERM", libc::SIGTERM)] {
        let before = State::now()?;
        let run = with_device(scenario, nvme)?;
        send(run.child.id(), signal)?;
        let end = run.end()?;
        scenario.fact(&format!("status after {name}"), end.status);
        scenario.check_equal(end.status, Some(130), format!("exit status after {name}"))?;
        let report = report(scenario)?;
        scenario.check(
            report["interrupted"] == true,
            format!("the report says so: {report}"),
        )?;
        scenario.check_equal(
            report["devices"][0]["given_back"].as_bool(),
            Some(true),
            format!("the device is given back after {name}"),
        )?;
        wait_for_disk()?;
        before.holds(scenario, &format!("after {name}"))?;
    }
    Ok(())
}

/// The process that runs a scenario is killed: that scenario has failed, the others run, and the device goes back.
fn one_that_dies(scenario: &mut Scenario, nvme: &str) -> Outcome {
    let before = State::now()?;
    let run = with_device(scenario, nvme)?;
    for worker in processes("--worker") {
        send(worker, libc::SIGKILL)?;
    }
    let end = run.end()?;
    scenario.check_equal(end.status, Some(1), "exit status after a worker was killed")?;
    let report = report(scenario)?;
    let results: Vec<&str> = report["scenarios"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|row| row["result"].as_str())
        .collect();
    scenario.fact("a worker killed", results.join(", "));
    scenario.check(
        report["failed"] == 1 && report["passed"] == 1,
        format!("one has failed, one passed: {results:?}"),
    )?;
    wait_for_disk()?;
    before.holds(scenario, "after a worker was killed")
}

/// The driver probes in its own time.
fn wait_for_disk() -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    while File::open(DISK).is_err() {
        if Instant::now() > deadline {
            return Err(Failure::new(format!("{DISK} does not come back")));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
