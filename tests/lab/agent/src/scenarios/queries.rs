// SPDX-License-Identifier: MIT OR Apache-2.0
//! Everything that a monitor can ask is asked, of every kind of guest: each `query-*` that can do without arguments, each
//! `info …`, SEV's commands with theirs, and all properties of the objects that make the guest, which are also set. Nobody
//! dies of it, nothing changes, and what can't be changed while the guest runs is refused.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::{Attempt, Failure};
use crate::host::kernel;
use crate::machine::Machine;
use crate::monitor::Monitor;
use crate::place;
use crate::qmp::{Gmem, Qmp};
use crate::scenario::{Outcome, Scenario};
use serde_json::{json, Value};
use std::collections::HashMap;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
const START: u64 = 16 * MIB;
const BYTES: u64 = 4 * MIB;
/// With ram=private: the payload's own memory.
const OPEN: u64 = 2 * MIB;
const OPEN_BYTES: u64 = 2 * MIB;
const EXIT_PATIENCE: Duration = Duration::from_secs(120);

/// There are 66 and 67. Fewer means that they were not found, and everything below would hold of nothing.
const FEWEST_QUERIES: usize = 55;
const FEWEST_INFOS: usize = 50;

/// What may be changed at any time, since it means something at any time: all others are refused.
const CHANGEABLE: &[&str] = &[
    "dump",
    "merge",
    "prealloc-threads",
    "x-use-canonical-path-for-ramblock-id",
    // A link: it is looked at when prealloc is set, and refused then.
    "prealloc-context",
];

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    confidential(scenario)?;
    if kernel::in_place() {
        all_private(scenario)?;
    }
    ordinary(scenario)?;
    plain(scenario)
}

fn confidential(scenario: &mut Scenario) -> Outcome {
    let kind = if kernel::in_place() {
        "in place"
    } else {
        "split"
    };
    scenario.prefix(&format!("{kind}: "));
    let directory = scenario.directory().join("confidential");
    let mut guest = Confidential::with_one_block(&directory, RAM_BYTES, "", &[])?;
    guest.machine.is_silent()?;
    guest.convert(scenario, START, BYTES, true)?;
    guest.fill(START - MIB, BYTES + 2 * MIB, 1)?;
    for page in 0..4 {
        guest.convert(scenario, 2 * START + page * 0x2000, 0x1000, true)?;
        guest.fill(2 * START + page * 0x2000, 0x1000, 2)?;
    }
    guest.agree(scenario, "before")?;
    ask(scenario, &mut guest.machine.qmp)?;
    bounds_hold(scenario, &mut guest.machine.qmp)?;
    objects(scenario, &mut guest.machine.qmp, &["ram0", "cgs0"])?;
    guest.agree(scenario, "after all questions")?;
    preallocate(scenario, &mut guest.machine.qmp)?;
    guest.agree_but_kernel(scenario, "after preallocation")?;
    guest.finish(scenario)
}

/// Bounds that were left out are read as they hold, which is what QEMU's manual says of them.
fn bounds_hold(scenario: &Scenario, qmp: &mut Qmp) -> Outcome {
    // In place a page keeps its memory.
    let (runs, delay, kept) = match kernel::in_place() {
        true => (1400, 0, 0),
        false => (0, 100, 64 * MIB),
    };
    for (property, expected) in [
        ("max-runs", runs),
        ("max-request", 1024 * MIB),
        ("release-delay", delay),
        ("release-max", kept),
    ] {
        let arguments = json!({"path": "/objects/ram0", "property": property});
        scenario.check_equal(
            qmp.execute("qom-get", arguments)?.as_u64(),
            Some(expected),
            format!("{property} of ram0, which was left out"),
        )?;
    }
    Ok(())
}

fn all_private(scenario: &mut Scenario) -> Outcome {
    scenario.prefix("ram=private: ");
    let object = format!(
        "sw-protected-guest,id=cgs0,ram=private,shared-base={OPEN},shared-size={OPEN_BYTES},image={}",
        place::payload()
    );
    let machine = "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0";
    bare(
        scenario,
        "all-private",
        machine,
        &["-object", &object],
        &["ram0", "cgs0"],
    )
}

fn ordinary(scenario: &mut Scenario) -> Outcome {
    scenario.prefix("ordinary: ");
    let machine = "q35,accel=kvm,memory-backend=ram0";
    bare(
        scenario,
        "ordinary",
        machine,
        &["-kernel", place::payload()],
        &["ram0"],
    )
}

fn plain(scenario: &mut Scenario) -> Outcome {
    scenario.prefix("plain RAM: ");
    bare(
        scenario,
        "plain",
        "q35,accel=kvm",
        &["-kernel", place::payload()],
        &[],
    )
}

/// A guest without a ledger.
fn bare(
    scenario: &mut Scenario,
    name: &str,
    machine: &str,
    more: &[&str],
    made_of: &[&str],
) -> Outcome {
    let object = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}");
    let size = format!("{}M", RAM_BYTES / MIB);
    let mut arguments = vec!["-machine", machine, "-m", &size];
    if machine.contains("memory-backend") {
        arguments.extend(["-object", &object]);
    }
    arguments.extend(more);
    let directory = scenario.directory().join(name);
    let (mut machine, serial) = Machine::start(&directory, &arguments)?;
    let mut monitor = Monitor::new(serial)?;
    machine.is_silent()?;
    monitor.fill(START, MIB, 3)?;
    ask(scenario, &mut machine.qmp)?;
    objects(scenario, &mut machine.qmp, made_of)?;
    if made_of.contains(&"ram0") {
        preallocate(scenario, &mut machine.qmp)?;
    }
    let difference = monitor.check(START, MIB, 3)?;
    scenario.check_equal(difference, None, "the guest finds what it wrote")?;
    monitor.power_off()?;
    machine.wait_for_exit(EXIT_PATIENCE)
}

/// Asks what the schema knows and what the human monitor's help lists.
fn ask(scenario: &mut Scenario, qmp: &mut Qmp) -> Outcome {
    let before = Gmem::query(qmp)?.books();
    let (mut answered, mut refused) = (0, 0);
    let commands = queries(qmp)?;
    for command in &commands {
        match qmp.try_execute(command, json!({}))? {
            Ok(_) => answered += 1,
            Err(_) => refused += 1,
        }
    }
    for (command, arguments) in with_arguments() {
        match qmp.try_execute(command, arguments)? {
            Ok(_) => answered += 1,
            Err(_) => refused += 1,
        }
    }
    let sev = qmp.execute("query-sev", json!({}))?;
    scenario.check_equal(sev["enabled"].as_bool(), Some(false), "query-sev's enabled")?;

    let infos = infos(qmp)?;
    for info in &infos {
        qmp.human(info)?;
    }
    scenario.check(
        qmp.human("info sev")?.contains("not enabled"),
        "info sev says that it is not enabled",
    )?;
    scenario.fact("query commands", commands.len());
    scenario.fact("answered", answered);
    scenario.fact("refused", refused);
    scenario.fact("info commands", infos.len());
    scenario.check(
        commands.len() >= FEWEST_QUERIES && infos.len() >= FEWEST_INFOS,
        format!(
            "{} query and {} info commands are all there are",
            commands.len(),
            infos.len()
        ),
    )?;
    let status = qmp.execute("query-status", json!({}))?;
    scenario.check_equal(
        status["status"].as_str(),
        Some("running"),
        "the VM's status after all questions",
    )?;
    scenario.check_equal(
        Gmem::query(qmp)?.books(),
        before,
        "query-gmem after all questions",
    )?;
    scenario.progress("all questions answered");
    Ok(())
}

/// The commands called query-* and x-query-* that need no arguments.
fn queries(qmp: &mut Qmp) -> Result<Vec<String>, Failure> {
    let schema = qmp.execute("query-qmp-schema", json!({}))?;
    let entities = schema
        .as_array()
        .attempt(|| "query-qmp-schema is no list".into())?;
    let by_name: HashMap<_, _> = entities
        .iter()
        .filter_map(|entity| Some((entity["name"].as_str()?, entity)))
        .collect();
    let needs_nothing = |command: &Value| {
        let arguments = command["arg-type"]
            .as_str()
            .and_then(|name| by_name.get(name));
        let members = arguments.and_then(|arguments| arguments["members"].as_array());
        members.is_none_or(|members| members.iter().all(|member| member.get("default").is_some()))
    };
    Ok(entities
        .iter()
        .filter(|entity| entity["meta-type"] == "command" && needs_nothing(entity))
        .filter_map(|entity| entity["name"].as_str())
        .filter(|name| name.starts_with("query-") || name.starts_with("x-query-"))
        .map(String::from)
        .collect())
}

fn with_arguments() -> Vec<(&'static str, Value)> {
    let nonce = "AAAAAAAAAAAAAAAAAAAAAA==";
    vec![
        ("query-sev-attestation-report", json!({"mnonce": nonce})),
        (
            "sev-inject-launch-secret",
            json!({"packet-header": nonce, "secret": nonce, "gpa": START}),
        ),
        (
            "sev-inject-launch-secret",
            json!({"packet-header": nonce, "secret": nonce}),
        ),
        ("query-stats", json!({"target": "vm"})),
        ("query-stats", json!({"target": "vcpu"})),
        (
            "query-cpu-model-expansion",
            json!({"type": "full", "model": {"name": "max"}}),
        ),
    ]
}

/// What `help info` lists, and some with the options that make them say more.
fn infos(qmp: &mut Qmp) -> Result<Vec<String>, Failure> {
    let help = qmp.human("help info")?;
    let mut infos: Vec<String> = help
        .lines()
        .filter_map(|line| {
            let name = line.trim().strip_prefix("info ")?;
            Some(format!("info {}", name.split_ascii_whitespace().next()?))
        })
        .collect();
    infos.extend(["info mtree -f -d -o", "info registers -a", "info stats vm"].map(String::from));
    Ok(infos)
}

/// Reads and sets every property of the objects that the guest is made of.
fn objects(scenario: &mut Scenario, qmp: &mut Qmp, made_of: &[&str]) -> Outcome {
    for (property, value) in [("confidential-guest-support", ""), ("memory-backend", "")] {
        let said = set(qmp, "/machine", property, json!(value))?;
        scenario.check(
            said.as_ref().is_some_and(|said| said.contains(property)),
            format!("the machine keeps its {property}: {said:?}"),
        )?;
    }
    for id in made_of {
        let path = format!("/objects/{id}");
        let properties = qmp.execute("qom-list", json!({"path": path}))?;
        let mut refusals = serde_json::Map::new();
        for property in properties.as_array().into_iter().flatten() {
            let (Some(name), Some(kind)) = (property["name"].as_str(), property["type"].as_str())
            else {
                continue;
            };
            // Preallocation fills files: it comes last.
            if ["type", "prealloc"].contains(&name) || kind.starts_with("child<") {
                continue;
            }
            let value = qmp.execute("qom-get", json!({"path": path, "property": name}))?;
            let said = set(qmp, &path, name, other(&value))?;
            let now = qmp.execute("qom-get", json!({"path": path, "property": name}))?;
            if CHANGEABLE.contains(&name) {
                scenario.check_equal(
                    set(qmp, &path, name, value)?,
                    None,
                    format!("how {id} refuses to have its {name} back"),
                )?;
                continue;
            }
            scenario.check(
                said.as_ref()
                    .is_some_and(|said| said.contains("cannot change")),
                format!("{id} refuses another {name}: {said:?}"),
            )?;
            scenario.check_equal(now, value, format!("{name} of {id} after it was refused"))?;
            refusals.insert(name.into(), said.into());
        }
        scenario.check(
            refusals.len() >= 4,
            format!("the properties of {id} were found: {refusals:?}"),
        )?;
        scenario.fact(&format!("{id} refuses to change"), refusals.len());
    }
    Ok(())
}

/// What QEMU said against it.
fn set(qmp: &mut Qmp, path: &str, name: &str, value: Value) -> Result<Option<String>, Failure> {
    let arguments = json!({"path": path, "property": name, "value": value});
    let answer = qmp.try_execute("qom-set", arguments)?;
    Ok(answer.err().map(|refusal| refusal.description))
}

/// A value of the same type that is another where one can be made up.
fn other(value: &Value) -> Value {
    match value {
        Value::Bool(value) => json!(!value),
        Value::Number(number) => json!(number.as_u64().unwrap_or_default() + 4096),
        other => other.clone(),
    }
}

/// The last thing to change: it fills files.
fn preallocate(scenario: &mut Scenario, qmp: &mut Qmp) -> Outcome {
    let before = Gmem::query(qmp)?;
    let said = set(qmp, "/objects/ram0", "prealloc", json!(true))?;
    scenario.check_equal(said, None, "how ram0 refuses to be preallocated")?;
    let after = Gmem::query(qmp)?;
    for name in ["private", "shared", "private-runs", "quarantined"] {
        scenario.check_equal(
            after.sum(name)?,
            before.sum(name)?,
            format!("query-gmem's {name} after prealloc=on"),
        )?;
    }
    Ok(())
}
