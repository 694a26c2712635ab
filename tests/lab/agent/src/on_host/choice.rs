// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which scenarios a host is for, and what each needs of it.

use super::facts::Facts;

/// What of a host a scenario can't do without.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Need {
    /// An ordinary VM whose RAM is a guest_memfd.
    Ordinary,
    /// KVM_X86_SW_PROTECTED_VM with private memory.
    SwProtected,
    InPlace,
    Split,
    /// The kernel's files about VMs.
    Debugfs,
    /// A device that was given, and iommufd.
    Device,
    /// Of those, an NVMe controller with a disk.
    Disk,
    /// Of those, so many of the lab's DMA engines.
    Engines(usize),
    /// `--firmware`.
    Firmware,
}
use Need::*;

/// In the order in which they run.
const ROWS: &[(&str, &[Need])] = &[
    ("ordinary-small", &[Ordinary]),
    ("timings", &[Ordinary]),
    ("ordinary-payload", &[Ordinary]),
    ("stock-linux", &[]),
    ("ordinary-linux", &[Ordinary]),
    ("device", &[Ordinary, Device]),
    ("device-disk", &[Ordinary, Disk]),
    ("confidential-convert", &[SwProtected]),
    ("bad-requests", &[SwProtected]),
    ("dump", &[SwProtected]),
    ("debugger", &[SwProtected]),
    ("queries", &[SwProtected]),
    ("reset-in-flight", &[SwProtected]),
    ("confidential-vfio-edu", &[SwProtected, Engines(1)]),
    ("system-reset", &[SwProtected, Engines(1)]),
    ("suspend", &[SwProtected, Engines(1)]),
    ("reset-rebuild", &[SwProtected, Engines(1), Debugfs]),
    ("all-private-start", &[SwProtected, InPlace, Engines(1)]),
    ("two-vcpus", &[SwProtected, Split, Engines(1)]),
    ("confidential-image", &[Firmware]),
];

/// Those of the lab that are not for somebody's host, by how their names begin.
const OF_THE_LAB: &[(&str, &str)] = &[
    (
        "address-map",
        "it has the kernel's memory allocations fail, which only the lab's kernel lets it",
    ),
    ("as-a-host", "it runs this very program"),
    (
        "balloon",
        "it compares the memory of the whole machine, on which nothing else may run",
    ),
    (
        "clock-page",
        "it switches how the lab's kernel finds the pages that it writes to",
    ),
    (
        "cut",
        "it counts system calls by the kernel's tracing, which is left alone here",
    ),
    ("direct-map", "no released kernel has it"),
    (
        "faults",
        "it has the kernel's memory allocations fail, which only the lab's kernel lets it",
    ),
    (
        "hot-plug",
        "it has the kernel's memory allocations fail, which only the lab's kernel lets it",
    ),
    (
        "huge",
        "it empties the host's pools of huge pages, which are left alone here",
    ),
    ("inplace-pinned", "no released kernel converts in place"),
    (
        "io-threads",
        "it changes vm.max_map_count and the host's pools of huge pages, which are left alone here",
    ),
    (
        "kernel-selftests",
        "it runs programs that are not in this folder",
    ),
    (
        "layout",
        "it empties the host's pools of huge pages, which are left alone here",
    ),
    (
        "many-runs",
        "it brings a fault of the kernel's back, which only the lab's kernel can",
    ),
    (
        "memory-error",
        "it breaks pages of the host's memory for good",
    ),
    (
        "memory-hot-plug",
        "it reads what the host's kernel says, all of it",
    ),
    (
        "no-attributes",
        "it switches the lab's kernel to others' ways",
    ),
    (
        "numa",
        "it compares the memory of whole nodes, on which nothing else may run",
    ),
    (
        "ordinary-vfio-nvme",
        "it writes to the disk; `device-disk` only reads",
    ),
    (
        "random-life",
        "it plugs devices that a host lacks; `cargo lab life` runs it in the lab",
    ),
    (
        "rebuild",
        "it has the kernel's memory allocations fail, which only the lab's kernel lets it",
    ),
    (
        "refusals",
        "it is about devices and options that a host may lack; it says the same in the lab",
    ),
    (
        "rollback",
        "it has the kernel's memory allocations fail, which only the lab's kernel lets it",
    ),
    (
        "snp-",
        "it is about the lab's stand-in for SNP; --firmware and --image boot a guest here",
    ),
    (
        "tdx-",
        "it is about the lab's stand-in for TDX; --firmware and --image boot a guest here",
    ),
    ("vhost-net", "it makes network devices of the host's"),
    (
        "vhost-user",
        "it makes a control group and empties a pool of huge pages, which are left alone here",
    ),
];

/// One scenario, and why it can't run if it can't.
#[derive(Debug, PartialEq)]
pub struct Choice {
    pub name: String,
    pub reason: Option<String>,
    /// It can't run although KVM has what it needs: that is for us to explain.
    pub fault: bool,
}

/// What was given besides the host's own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Given {
    pub devices: usize,
    pub engines: usize,
    pub disk: bool,
    pub firmware: bool,
}

/// All scenarios: `known` are the agent's. An error names those of `only` that there are not.
pub fn choose(
    facts: &Facts,
    given: Given,
    only: Option<&[String]>,
    known: &[&str],
) -> Result<Vec<Choice>, String> {
    let is_row = |name: &str| ROWS.iter().any(|row| row.0 == name);
    let wanted = |name: &str| only.is_none_or(|only| only.iter().any(|one| one == name));
    if let Some(strange) = only.and_then(|only| {
        let is_there = |name: &String| is_row(name) || known.contains(&name.as_str());
        only.iter().find(|name| !is_there(name))
    }) {
        return Err(format!("there is no scenario {strange}; --list shows all"));
    }
    let ours = ROWS.iter().map(|(name, needs)| Choice {
        name: name.to_string(),
        reason: needs.iter().find_map(|need| missing(*need, facts, given)),
        fault: needs.contains(&Ordinary) && facts.library_refuses(),
    });
    let others = known
        .iter()
        .filter(|name| !is_row(name))
        .map(|name| Choice {
            name: name.to_string(),
            reason: Some(of_the_lab(name)),
            fault: false,
        });
    Ok(ours
        .chain(others)
        .filter(|choice| wanted(&choice.name))
        .collect())
}

fn of_the_lab(name: &str) -> String {
    let why = OF_THE_LAB
        .iter()
        .filter(|(start, _)| name.starts_with(start))
        .max_by_key(|(start, _)| start.len())
        .map_or(
            "it was made for the lab's own machine and nobody has tried it on another",
            |row| row.1,
        );
    format!("runs in the lab only: {why}")
}

/// Why the host can't give that.
fn missing(need: Need, facts: &Facts, given: Given) -> Option<String> {
    let sentence = match need {
        Ordinary => return facts.ordinary.as_ref().err().cloned(),
        SwProtected => return facts.sw_protected.as_ref().err().cloned(),
        InPlace if facts.in_place() => return None,
        InPlace => "this kernel does not convert in place",
        Split if !facts.in_place() => return None,
        Split => "this kernel converts in place, there is no second memory",
        Debugfs if facts.debugfs => return None,
        Debugfs => {
            "debugfs is not mounted or closed (lockdown): /sys/kernel/debug/kvm can't be read"
        }
        Device if given.devices > 0 => return None,
        Device => "no device was given: --device PCI",
        Disk if given.disk => return None,
        Disk => "no NVMe controller with a disk of 16 MiB or more was given: --device PCI",
        Engines(count) if given.engines >= count => return None,
        Engines(_) => "it needs the lab's DMA engine (edu), which no real machine has",
        Firmware if given.firmware => return None,
        Firmware if facts.snp.is_none() && facts.tdx.is_none() => {
            "this host has neither SNP (VM type 4) nor TDX (VM type 5)"
        }
        Firmware => "no guest was given: --firmware OVMF.fd --image DISK",
    };
    Some(sentence.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason<'a>(choices: &'a [Choice], name: &str) -> Option<&'a str> {
        let choice = choices.iter().find(|choice| choice.name == name);
        choice.expect(name).reason.as_deref()
    }

    #[test]
    fn each_scenario_runs_or_has_a_reason() {
        let facts = Facts {
            ordinary: Ok("in-place".into()),
            sw_protected: Err("no such VM type".into()),
            ..Facts::nothing()
        };
        let known = [
            "stock-linux",
            "rollback-late",
            "snp-launch",
            "brand-new",
            "dump",
        ];
        let choices = choose(&facts, Given::default(), None, &known).unwrap();
        assert_eq!(reason(&choices, "ordinary-payload"), None);
        assert_eq!(reason(&choices, "dump"), Some("no such VM type"));
        assert!(reason(&choices, "rollback-late")
            .unwrap()
            .contains("allocations"));
        assert!(reason(&choices, "snp-launch")
            .unwrap()
            .contains("--firmware"));
        assert!(reason(&choices, "brand-new").unwrap().contains("lab"));
        assert!(reason(&choices, "device").unwrap().contains("--device"));
        assert!(reason(&choices, "confidential-image")
            .unwrap()
            .contains("neither"));
        assert_eq!(
            choices
                .iter()
                .filter(|choice| choice.name == "dump")
                .count(),
            1
        );
    }

    #[test]
    fn what_is_given_takes_reasons_away() {
        let facts = Facts {
            ordinary: Ok("in-place".into()),
            sw_protected: Ok("split".into()),
            debugfs: true,
            tdx: Some(Default::default()),
            ..Facts::nothing()
        };
        let given = Given {
            devices: 2,
            engines: 1,
            disk: true,
            firmware: true,
        };
        let choices = choose(&facts, given, None, &[]).unwrap();
        for (name, _) in ROWS {
            let wants_in_place = *name == "all-private-start";
            assert_eq!(reason(&choices, name).is_some(), wants_in_place, "{name}");
        }
    }

    #[test]
    fn what_the_library_refuses_on_a_kernel_that_has_it_is_a_fault() {
        let mut facts = Facts::nothing();
        facts.capabilities = vec![
            ("user_memory2", 1),
            ("guest_memfd", 1),
            ("guest_memfd_flags", 3),
        ];
        let fault = |facts: &Facts| {
            let choices = choose(facts, Given::default(), None, &[]).unwrap();
            choices
                .iter()
                .find(|choice| choice.name == "timings")
                .unwrap()
                .fault
        };
        assert!(fault(&facts));
        facts.capabilities[2].1 = 0;
        assert!(!fault(&facts));
    }

    #[test]
    fn one_that_there_is_not_is_named() {
        let only = ["dump".to_string(), "dumb".to_string()];
        let refusal = choose(&Facts::nothing(), Given::default(), Some(&only), &[]).unwrap_err();
        assert!(refusal.contains("dumb"));
        let chosen = choose(&Facts::nothing(), Given::default(), Some(&only[..1]), &[]).unwrap();
        assert_eq!(chosen.len(), 1);
    }

    #[test]
    fn reasons_are_of_scenarios_that_there_are() {
        let known = crate::scenarios::names();
        for (name, _) in ROWS {
            assert!(known.contains(name), "{name}");
        }
        let expected = ["snp-", "tdx-"];
        for (start, _) in OF_THE_LAB.iter().filter(|row| !expected.contains(&row.0)) {
            assert!(known.iter().any(|name| name.starts_with(start)), "{start}");
        }
    }
}
