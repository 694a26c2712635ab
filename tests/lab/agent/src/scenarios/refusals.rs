// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can't work with our memory is refused before it goes wrong, with a sentence that names what and why, whichever of the
//! two comes first: on the command line, where QEMU ends, and on the monitor, where the VM goes on as if nobody had asked.

use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::kernel;
use crate::host::passthrough::{to_vfio, EDU};
use crate::host::vfio_user::VfioUser;
use crate::machine::Machine;
use crate::place;
use crate::qmp::{Gmem, Qmp};
use crate::scenario::{Outcome, Scenario};
use serde_json::{json, Value};
use std::time::{Duration, Instant};

const RAM0: &str = "memory-backend-gmem,id=ram0,size=64M";
const MEM1: &str = "memory-backend-gmem,id=mem1,size=64M";
const ORDINARY: &str = "q35,accel=kvm,memory-backend=ram0";
const CGS: &str = "sw-protected-guest,id=cgs0";
const JOB_PATIENCE: Duration = Duration::from_secs(60);
/// What the refusal of a device behind an in-guest IOMMU says.
const IOMMU: &[&str] = &["in-guest IOMMU", "'ram0'", "without the IOMMU"];

/// A command line, and what its refusal says.
struct Start {
    name: &'static str,
    arguments: Vec<String>,
    says: &'static [&'static str],
}

fn start(name: &'static str, arguments: &[&str], says: &'static [&'static str]) -> Start {
    let arguments = arguments.iter().map(|word| word.to_string()).collect();
    Start {
        name,
        arguments,
        says,
    }
}

/// As `start`, with an ordinary VM whose RAM is ours.
fn ordinary(name: &'static str, more: &[&str], says: &'static [&'static str]) -> Start {
    let mut arguments = vec!["-object", RAM0, "-m", "64M", "-machine", ORDINARY];
    arguments.extend(more);
    start(name, &arguments, says)
}

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&EDU)?;
    // What the kernel has no part in is the same in all modes.
    let starts = match kernel::in_place() {
        true => of_private_ram(),
        false => of_command_lines(&device),
    };
    for (index, one) in starts.iter().enumerate() {
        let arguments: Vec<_> = one.arguments.iter().map(String::as_str).collect();
        let directory = scenario.directory().join(format!("start-{index}"));
        let said = Machine::refusal(&directory, &arguments)
            .map_err(|failure| Failure::new(format!("{}: {failure}", one.name)))?;
        names(scenario, one.name, &said, one.says)?;
    }
    scenario.fact("command lines refused", starts.len());
    mixed_memory(scenario)?;
    if kernel::in_place() {
        return Ok(());
    }
    on_the_monitor(scenario)?;
    behind_an_iommu(scenario, &device)?;
    another_process_behind_an_iommu(scenario)
}

/// The sentence has all that it is to name.
fn names(scenario: &mut Scenario, name: &str, said: &str, parts: &[&str]) -> Outcome {
    scenario.fact(name, said);
    for part in parts {
        scenario.check(
            said.contains(part),
            format!("{name}: the refusal names {part}: {said}"),
        )?;
    }
    Ok(())
}

fn of_command_lines(device: &str) -> Vec<Start> {
    let vfio = format!("vfio-pci,host={device},iommufd=iommufd0");
    let behind = |iommu| {
        let machine = "q35,accel=kvm,kernel-irqchip=split,memory-backend=ram0";
        let mut arguments = vec!["-object", RAM0, "-m", "64M", "-machine", machine];
        arguments.extend(["-device", iommu, "-object", "iommufd,id=iommufd0"]);
        arguments.extend(["-device", &vfio]);
        arguments
    };
    const OTHER: &[&str] = &["'mem1'", "of another kind"];
    let numa = |first: &'static str, second: &'static str| {
        let mut arguments = vec!["-object", CGS, "-m", "128M", "-machine"];
        arguments.push("q35,accel=kvm,smm=off,confidential-guest-support=cgs0");
        arguments.extend([
            "-object",
            RAM0,
            "-object",
            "memory-backend-ram,id=ram1,size=64M",
        ]);
        arguments.extend(["-numa", first, "-numa", second]);
        arguments
    };
    const MIXED: &[&str] = &["'ram0'", "memory-backend-ram 'ram1'", "for all of it"];
    vec![
        start(
            "TCG",
            &[
                "-object",
                RAM0,
                "-m",
                "64M",
                "-machine",
                "q35,accel=tcg,memory-backend=ram0",
            ],
            &["'ram0'", "accel=kvm"],
        ),
        start(
            "a dirty ring",
            &[
                "-object",
                RAM0,
                "-m",
                "64M",
                "-machine",
                "q35,memory-backend=ram0",
                "-accel",
                "kvm,dirty-ring-size=4096",
            ],
            &["'ram0'", "dirty-ring-size"],
        ),
        ordinary(
            "-incoming",
            &["-incoming", "defer"],
            &["'ram0'", "incoming migration"],
        ),
        ordinary(
            "-only-migratable",
            &["-only-migratable"],
            &["'ram0'", "migration"],
        ),
        ordinary(
            "-loadvm",
            &["-loadvm", "one"],
            &["loading a snapshot", "'ram0'"],
        ),
        start(
            "one backend for two nodes",
            &[
                "-object",
                RAM0,
                "-m",
                "128M",
                "-machine",
                "q35,accel=kvm",
                "-numa",
                "node,memdev=ram0",
                "-numa",
                "node,memdev=ram0",
            ],
            &["ram0", "multiple times"],
        ),
        start(
            "mixed RAM, ours first",
            &numa("node,memdev=ram0", "node,memdev=ram1"),
            MIXED,
        ),
        start(
            "mixed RAM, ours second",
            &numa("node,memdev=ram1", "node,memdev=ram0"),
            MIXED,
        ),
        ordinary(
            "acpi-erst",
            &["-object", MEM1, "-device", "acpi-erst,memdev=mem1"],
            &["acpi-erst", "'mem1'", "of another kind"],
        ),
        ordinary(
            "sp-mem",
            &[
                "-m",
                "64M,maxmem=1G",
                "-object",
                MEM1,
                "-device",
                "sp-mem,memdev=mem1",
            ],
            &["sp-mem", "'mem1'", "of another kind"],
        ),
        ordinary(
            "cxl-type3",
            &[
                "-machine",
                "cxl=on",
                "-m",
                "64M,maxmem=1G",
                "-object",
                "memory-backend-gmem,id=mem1,size=256M",
                "-device",
                "pxb-cxl,bus_nr=12,bus=pcie.0,id=cxl1",
                "-device",
                "cxl-rp,port=0,bus=cxl1,id=rp0,chassis=0,slot=2",
                "-device",
                "cxl-type3,bus=rp0,volatile-memdev=mem1",
            ],
            OTHER,
        ),
        start("vfio-pci behind intel-iommu", &behind("intel-iommu"), IOMMU),
        start("vfio-pci behind amd-iommu", &behind("amd-iommu"), IOMMU),
        start(
            "vfio-pci behind virtio-iommu",
            &behind("virtio-iommu-pci"),
            IOMMU,
        ),
        start(
            "SMM in a confidential guest",
            &[
                "-object",
                CGS,
                "-object",
                RAM0,
                "-m",
                "64M",
                "-machine",
                "q35,accel=kvm,smm=on,confidential-guest-support=cgs0,memory-backend=ram0",
            ],
            &["sw-protected-guest", "SMM", "smm=off"],
        ),
    ]
}

/// A guest whose RAM starts private.
fn of_private_ram() -> Vec<Start> {
    let private = |properties: &str, more: &[&str]| {
        let cgs = format!("{CGS},ram=private{properties}");
        let mut arguments = vec!["-object", &cgs, "-object", RAM0, "-m", "64M", "-machine"];
        arguments.push("q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0");
        arguments.extend(more);
        arguments.iter().map(|word| word.to_string()).collect()
    };
    let open = format!(",image={},shared-base=2M,shared-size=2M", place::payload());
    vec![
        Start {
            name: "loader of data",
            arguments: private(
                &open,
                &["-device", "loader,addr=0x800000,data=1,data-len=8"],
            ),
            says: &["loader", "0x800000", "private", "file=FILE"],
        },
        Start {
            name: "no image",
            arguments: private("", &[]),
            says: &["ram=private", "image=FILE"],
        },
        Start {
            name: "locked memory",
            arguments: private(&open, &["-overcommit", "mem-lock=on"]),
            says: &["'ram0'", "mem-lock=on-fault"],
        },
        Start {
            name: "a range that is no RAM",
            arguments: private(
                &format!(",image={},shared-base=3G,shared-size=2M", place::payload()),
                &[],
            ),
            says: &["shared-base", "not RAM"],
        },
    ]
}

/// A machine that doesn't run; it is asked and goes on not running.
fn stopped(scenario: &Scenario, name: &str, arguments: &[&str]) -> Result<Machine, Failure> {
    let mut all = vec!["-S"];
    all.extend(arguments);
    let directory = scenario.directory().join(name);
    Machine::start(&directory, &all).map(|(machine, _)| machine)
}

/// Nothing of what was refused has an effect.
fn as_before(scenario: &Scenario, qmp: &mut Qmp, before: &Value, name: &str) -> Outcome {
    scenario.check_equal(
        Gmem::query(qmp)?.books(),
        before.clone(),
        format!("query-gmem after {name} was refused"),
    )?;
    let status = qmp.execute("query-status", json!({}))?;
    scenario.check_equal(
        status["status"].as_str(),
        Some("prelaunch"),
        format!("the VM's status after {name} was refused"),
    )
}

fn memory(kind: &str, id: &str) -> Value {
    json!({"qom-type": kind, "id": id, "size": 64 << 20})
}

fn on_the_monitor(scenario: &mut Scenario) -> Outcome {
    scenario.prefix("monitor: ");
    let mut machine = stopped(
        scenario,
        "monitor",
        &[
            "-object",
            RAM0,
            "-m",
            "64M,slots=4,maxmem=1G",
            "-machine",
            "q35,accel=kvm,nvdimm=on,memory-backend=ram0",
            "-device",
            "pcie-root-port,id=port0,chassis=1",
        ],
    )?;
    let qmp = &mut machine.qmp;
    qmp.execute("object-add", memory("memory-backend-gmem", "mem1"))?;
    let before = Gmem::query(qmp)?.books();
    for (name, device) in [
        (
            "nvme",
            json!({"driver": "nvme", "bus": "port0", "serial": "1", "pmrdev": "mem1"}),
        ),
        (
            "ivshmem-plain",
            json!({"driver": "ivshmem-plain", "bus": "port0", "memdev": "mem1"}),
        ),
        (
            "virtio-pmem",
            json!({"driver": "virtio-pmem-pci", "bus": "port0", "memdev": "mem1"}),
        ),
        (
            "virtio-mem",
            json!({"driver": "virtio-mem-pci", "bus": "port0", "memdev": "mem1"}),
        ),
        ("nvdimm", json!({"driver": "nvdimm", "memdev": "mem1"})),
    ] {
        let said = qmp.refusal("device_add", device)?;
        names(scenario, name, &said, &[name, "'mem1'", "of another kind"])?;
        as_before(scenario, qmp, &before, name)?;
    }
    objects(scenario, qmp, &before)?;
    snapshots(scenario, qmp, &before)?;
    migration(scenario, qmp, &before)?;

    // What was refused holds on to nothing.
    qmp.execute(
        "device_add",
        json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "mem1"}),
    )?;
    let again = json!({"driver": "pc-dimm", "id": "dimm1", "memdev": "mem1"});
    let said = qmp.refusal("device_add", again)?;
    names(scenario, "one backend for two modules", &said, &["mem1"])?;
    qmp.execute("object-add", memory("memory-backend-gmem", "mem2"))?;
    qmp.execute("object-del", json!({"id": "mem2"}))?;
    scenario.prefix("");
    Ok(())
}

/// Objects that can't be made, one after the other.
fn objects(scenario: &mut Scenario, qmp: &mut Qmp, before: &Value) -> Outcome {
    for (name, property, value, part) in [
        ("no size", "size", json!(0), "size"),
        ("half a page", "size", json!(6144), "multiple"),
        ("share=off", "share", json!(false), "share"),
        (
            "hugetlbsize alone",
            "hugetlbsize",
            json!(2 << 20),
            "hugetlb=on",
        ),
        (
            "split in an ordinary VM",
            "backing",
            json!("split"),
            "split",
        ),
        (
            "a policy without nodes",
            "policy",
            json!("bind"),
            "host-nodes",
        ),
        ("no such node", "host-nodes", json!([120]), "host-nodes"),
        (
            "convert-unit of 5000",
            "convert-unit",
            json!("5000"),
            "convert-unit",
        ),
        (
            "max-runs in an ordinary VM",
            "max-runs",
            json!(5),
            "leave it out",
        ),
        (
            "max-request in an ordinary VM",
            "max-request",
            json!(1 << 20),
            "leave it out",
        ),
        (
            "release-delay in an ordinary VM",
            "release-delay",
            json!(5),
            "leave it out",
        ),
        (
            "release-max in an ordinary VM",
            "release-max",
            json!(1 << 20),
            "leave it out",
        ),
    ] {
        let mut object = memory("memory-backend-gmem", "bad0");
        object[property] = value;
        let said = qmp.refusal("object-add", object)?;
        names(scenario, name, &said, &[part])?;
        as_before(scenario, qmp, before, name)?;
    }
    Ok(())
}

fn snapshots(scenario: &mut Scenario, qmp: &mut Qmp, before: &Value) -> Outcome {
    const LOAD: &[&str] = &["loading a snapshot", "memory-backend-gmem"];
    let load = json!({"job-id": "load", "tag": "one", "vmstate": "disk0", "devices": ["disk0"]});
    let said = qmp.refusal("snapshot-load", load)?;
    names(scenario, "snapshot-load", &said, LOAD)?;
    let said = qmp.human("loadvm one")?;
    names(scenario, "loadvm", &said, LOAD)?;
    as_before(scenario, qmp, before, "loadvm")?;
    let said = qmp.human("savevm one")?;
    names(
        scenario,
        "savevm",
        &said,
        &["migration", "memory-backend-gmem"],
    )?;
    as_before(scenario, qmp, before, "savevm")?;

    let save = json!({"job-id": "save", "tag": "one", "vmstate": "disk0", "devices": ["disk0"]});
    qmp.execute("snapshot-save", save)?;
    let deadline = Instant::now() + JOB_PATIENCE;
    let job = loop {
        let jobs = qmp.execute("query-jobs", json!({}))?;
        let job = jobs[0].clone();
        if job["status"] == "concluded" {
            break job;
        }
        scenario.check(Instant::now() < deadline, "snapshot-save ends")?;
    };
    let said = job["error"].as_str().unwrap_or_default();
    names(
        scenario,
        "snapshot-save",
        said,
        &["migration", "memory-backend-gmem"],
    )?;
    qmp.execute("job-dismiss", json!({"id": "save"}))?;
    as_before(scenario, qmp, before, "snapshot-save")
}

/// However a migration is asked for: either QEMU can't do it so at all, or we are why.
fn migration(scenario: &mut Scenario, qmp: &mut Qmp, before: &Value) -> Outcome {
    const OURS: &[&str] = &["memory-backend-gmem", "migration"];
    // Nothing listens there, and nobody gets so far.
    let migrate = json!({"uri": "tcp:127.0.0.1:1"});
    let to_file = json!({"uri": "file:/dev/null"});
    for mode in ["normal", "cpr-reboot", "cpr-exec"] {
        let set = json!({"mode": mode, "cpr-exec-command": ["/bin/true"]});
        qmp.execute("migrate-set-parameters", set)?;
        let said = qmp.refusal("migrate", to_file.clone())?;
        names(scenario, &format!("migrate, {mode}"), &said, OURS)?;
        as_before(scenario, qmp, before, mode)?;
    }
    let set = json!({"mode": "cpr-transfer"});
    qmp.execute("migrate-set-parameters", set)?;
    let channel = |name| {
        let address =
            json!({"transport": "socket", "type": "unix", "path": format!("/tmp/{name}")});
        json!({"channel-type": name, "addr": address})
    };
    let channels = json!({"channels": [channel("main"), channel("cpr")]});
    let said = qmp.refusal("migrate", channels)?;
    // Other memory of the machine may be named before ours.
    names(scenario, "migrate, cpr-transfer", &said, &[])?;
    as_before(scenario, qmp, before, "cpr-transfer")?;
    qmp.execute("migrate-set-parameters", json!({"mode": "normal"}))?;
    for capability in [
        "x-colo",
        "background-snapshot",
        "dirty-limit",
        "postcopy-ram",
        "x-ignore-shared",
        "multifd",
    ] {
        let set =
            |state: bool| json!({"capabilities": [{"capability": capability, "state": state}]});
        let name = format!("migrate, {capability}");
        match qmp.try_execute("migrate-set-capabilities", set(true))? {
            Ok(_) => {
                let said = qmp.refusal("migrate", migrate.clone())?;
                names(scenario, &name, &said, OURS)?;
                qmp.execute("migrate-set-capabilities", set(false))?;
            }
            Err(refusal) => names(scenario, &name, &refusal.description, &[])?,
        }
        as_before(scenario, qmp, before, capability)?;
    }
    let said = qmp.refusal("migrate", migrate)?;
    names(scenario, "migrate", &said, OURS)?;
    let blocked = qmp.execute("query-migrate", json!({}))?;
    let reasons = blocked["blocked-reasons"]
        .as_array()
        .attempt(|| format!("query-migrate says why: {blocked}"))?;
    scenario.check_equal(
        reasons.len(),
        2,
        "reasons of query-migrate, one for each object",
    )?;
    for command in ["migrate-incoming", "migrate-recover"] {
        qmp.refusal(command, json!({"uri": "file:/dev/null"}))?;
    }
    qmp.refusal("x-colo-lost-heartbeat", json!({}))?;
    as_before(scenario, qmp, before, "what only a destination can do")
}

/// RAM of two kinds in a confidential guest, when the second comes as a module.
fn mixed_memory(scenario: &mut Scenario) -> Outcome {
    const OURS: &str = "memory-backend-gmem";
    const OTHER: &str = "memory-backend-ram";
    for (name, main, second) in [("ours first", OURS, OTHER), ("ours second", OTHER, OURS)] {
        scenario.prefix(&format!("{name}: "));
        let object = format!("{main},id=main0,size=64M");
        let mut machine = stopped(
            scenario,
            name,
            &[
                "-object",
                CGS,
                "-object",
                &object,
                "-m",
                "64M,slots=2,maxmem=1G",
                "-machine",
                "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=main0",
            ],
        )?;
        let qmp = &mut machine.qmp;
        qmp.execute("object-add", memory(second, "second0"))?;
        let before = Gmem::query(qmp)?.books();
        if main == OURS {
            releases(scenario, qmp, &before)?;
        }
        let module = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "second0"});
        let said = qmp.refusal("device_add", module)?;
        names(
            scenario,
            "a module of the other kind",
            &said,
            &["'main0'", "'second0'", "for all of it"],
        )?;
        as_before(scenario, qmp, &before, "the module")?;
        qmp.execute("object-del", json!({"id": "second0"}))?;
        qmp.execute("object-add", memory(main, "third0"))?;
        let module = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "third0"});
        qmp.execute("device_add", module)?;
    }
    scenario.prefix("");
    Ok(())
}

/// When the memory of converted pages is to be freed, where there is none of that; and bounds that allow nothing.
fn releases(scenario: &mut Scenario, qmp: &mut Qmp, before: &Value) -> Outcome {
    const IN_PLACE: &str = "no conversion frees memory in place";
    for (name, properties, part) in [
        (
            "release-max=0",
            json!({"release-max": 0}),
            "use release-delay=0",
        ),
        (
            "max-request=0",
            json!({"max-request": 0}),
            "use convert-unit=off",
        ),
        (
            "release-max of less than a page",
            json!({"release-max": 4095}),
            "less than a page",
        ),
        (
            "max-request with convert-unit=off",
            json!({"convert-unit": "off", "max-request": 1 << 20}),
            "leave one of them out",
        ),
        (
            "release-max without a delay",
            json!({"release-delay": 0, "release-max": 1 << 20}),
            "release-delay that is not 0",
        ),
        (
            "release-delay in place",
            json!({"backing": "in-place", "release-delay": 5}),
            IN_PLACE,
        ),
        (
            "release-max in place",
            json!({"backing": "in-place", "release-max": 1 << 20}),
            IN_PLACE,
        ),
    ] {
        let mut object = memory("memory-backend-gmem", "bad0");
        for (property, value) in properties.as_object().into_iter().flatten() {
            object[property] = value.clone();
        }
        let said = qmp.refusal("object-add", object)?;
        names(scenario, name, &said, &["'bad0'", part])?;
        as_before(scenario, qmp, before, name)?;
    }
    Ok(())
}

/// A device behind an in-guest IOMMU first, our memory afterwards.
fn behind_an_iommu(scenario: &mut Scenario, device: &str) -> Outcome {
    scenario.prefix("an IOMMU first: ");
    let vfio = format!("vfio-pci,id=edu0,host={device},iommufd=iommufd0");
    let mut machine = stopped(
        scenario,
        "iommu-first",
        &[
            "-m",
            "64M,slots=2,maxmem=1G",
            "-machine",
            "q35,accel=kvm,kernel-irqchip=split",
            "-device",
            "intel-iommu,caching-mode=on,aw-bits=39",
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            &vfio,
        ],
    )?;
    let qmp = &mut machine.qmp;
    let said = qmp.refusal("object-add", memory("memory-backend-gmem", "mem1"))?;
    names(
        scenario,
        "our memory afterwards",
        &said,
        &["'mem1'", "in-guest IOMMU", device, "without the IOMMU"],
    )?;
    qmp.execute("object-add", memory("memory-backend-memfd", "mem1"))?;
    scenario.prefix("");
    Ok(())
}

/// A device that another process emulates, over vfio-user.
fn another_process_behind_an_iommu(scenario: &mut Scenario) -> Outcome {
    let server = VfioUser::start(scenario.directory())?;
    let device = json!({
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": server.socket()},
    })
    .to_string();
    let arguments = [
        "-object",
        RAM0,
        "-m",
        "64M",
        "-machine",
        "q35,accel=kvm,kernel-irqchip=split,memory-backend=ram0",
        "-device",
        "intel-iommu,caching-mode=on",
        "-device",
        &device,
    ];
    let said = Machine::refusal(&scenario.directory().join("vfio-user"), &arguments)?;
    names(scenario, "vfio-user behind intel-iommu", &said, IOMMU)
}
