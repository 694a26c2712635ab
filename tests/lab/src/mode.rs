// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ways in which L1 is switched on, and which scenario runs in which.

/// What L1's kernel offers to confidential guests. One boot of L1 is in one mode; QEMU is the same file in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The lab's kernel with conversion in place switched off: to a program it is the kernel that it was made from.
    Split,
    /// The same kernel with conversion in place.
    InPlace,
    /// As `InPlace`, and the one bit of the ABI that two features claim means files without direct map, not huge pages.
    NoDirectMap,
    /// As `InPlace`, and the kernel does what it may as others do it: see kernel-patches/0008. `test --full` runs there what
    /// runs in `InPlace`.
    Foreign,
    /// The kernel as it came. `test --full` runs there what runs in `Split`.
    Unpatched,
}

use Mode::{Foreign, InPlace, NoDirectMap, Split, Unpatched};

impl Mode {
    /// In the order in which they are booted.
    pub const ALL: [Mode; 5] = [Split, InPlace, NoDirectMap, Foreign, Unpatched];

    /// For the kernel's command line.
    pub fn option(self) -> &'static str {
        match self {
            Split => "kvm.gmem_in_place_conversion=0",
            InPlace => "kvm.gmem_in_place_conversion=1",
            // Zero-copy is one more who pins.
            NoDirectMap => {
                "kvm.gmem_in_place_conversion=1 kvm.gmem_no_direct_map=1 vhost_net.experimental_zcopytx=1"
            }
            Foreign => "kvm.gmem_in_place_conversion=1 kvm.lab_foreign=11 lab.programs=foreign",
            Unpatched => "",
        }
    }

    /// What a scenario or program is called that runs in this mode.
    pub fn name(self, name: &str) -> String {
        match self {
            Split => name.to_string(),
            InPlace => format!("in-place/{name}"),
            NoDirectMap => format!("no-direct-map/{name}"),
            Foreign => format!("foreign/{name}"),
            Unpatched => format!("unpatched/{name}"),
        }
    }

    /// Whether only `test --full` runs anything there.
    pub fn is_for_full(self) -> bool {
        matches!(self, Foreign | Unpatched)
    }
}

/// How long a scenario may take on a slow machine.
const LIMIT: u64 = 400;
const NEVER: &[Mode] = &[];
const IN_SPLIT: &[Mode] = &[Split];
const IN_PLACE: &[Mode] = &[InPlace];
const BOTH: &[Mode] = &[Split, InPlace];

/// A scenario, the modes that `test` runs it in, and those of `demo`.
struct Scenario(&'static str, &'static [Mode], &'static [Mode]);

/// In the order in which one boot of L1 runs them: a lab that can't run a stock guest can't run ours.
const SCENARIOS: &[Scenario] = &[
    Scenario("stock-linux", BOTH, NEVER),
    // Its disk is with its own driver until a scenario takes it.
    Scenario(AS_A_HOST, BOTH, NEVER),
    Scenario("ordinary-linux", BOTH, IN_SPLIT),
    Scenario("ordinary-vfio-nvme", BOTH, IN_SPLIT),
    Scenario("confidential-convert", BOTH, BOTH),
    Scenario("confidential-vfio-edu", BOTH, BOTH),
    Scenario("bad-requests", BOTH, IN_SPLIT),
    Scenario("system-reset", BOTH, NEVER),
    Scenario("address-map", BOTH, NEVER),
    Scenario("hot-plug", BOTH, NEVER),
    // In place no conversion frees memory, neither soon nor late.
    Scenario("hot-plug-at-once", IN_SPLIT, NEVER),
    Scenario("hot-plug-late", IN_SPLIT, NEVER),
    Scenario("memory-hot-plug", BOTH, NEVER),
    Scenario("dump", BOTH, NEVER),
    // Takes huge pages, which are had in pieces only later in a boot.
    Scenario("io-threads", BOTH, NEVER),
    Scenario("cut", BOTH, NEVER),
    Scenario("cut-at-once", IN_SPLIT, NEVER),
    Scenario("cut-late", IN_SPLIT, NEVER),
    Scenario("two-vcpus", IN_SPLIT, NEVER),
    // In place, huge pages have a scenario of their own: no conversion gives one back.
    Scenario("hugetlb", IN_SPLIT, NEVER),
    Scenario("layout", BOTH, NEVER),
    Scenario("numa", BOTH, NEVER),
    Scenario("reset-rebuild", BOTH, NEVER),
    Scenario("reset-in-flight", BOTH, NEVER),
    Scenario("suspend", BOTH, NEVER),
    Scenario("rebuild-life", BOTH, NEVER),
    // Of an ordinary guest, which is the same on either kind of kernel.
    Scenario("rebuild-pins", IN_SPLIT, NEVER),
    Scenario("rebuild-nvme", IN_SPLIT, NEVER),
    Scenario("rollback", BOTH, NEVER),
    Scenario("rollback-at-once", IN_SPLIT, NEVER),
    Scenario("rollback-late", IN_SPLIT, NEVER),
    Scenario("inplace-pinned", IN_PLACE, IN_PLACE),
    Scenario("all-private-start", IN_PLACE, IN_PLACE),
    Scenario("huge-convert", IN_PLACE, IN_PLACE),
    Scenario("memory-error", BOTH, NEVER),
    Scenario("random-life", BOTH, NEVER),
    Scenario("faults", BOTH, NEVER),
    Scenario("balloon", BOTH, NEVER),
    Scenario("balloon-linux", BOTH, NEVER),
    Scenario("vhost-user", BOTH, NEVER),
    Scenario("vhost-net", BOTH, NEVER),
    Scenario("direct-map", &[Split, InPlace, NoDirectMap], NEVER),
    Scenario("clock-page", &[Split, InPlace, NoDirectMap], NEVER),
    Scenario("no-attributes", BOTH, NEVER),
    Scenario("many-runs", IN_PLACE, NEVER),
    Scenario("queries", BOTH, NEVER),
    Scenario("debugger", BOTH, NEVER),
    Scenario("refusals", BOTH, NEVER),
    Scenario("snp-launch", BOTH, BOTH),
    Scenario("tdx-launch", BOTH, BOTH),
    Scenario("snp-convert", BOTH, NEVER),
    Scenario("tdx-convert", BOTH, NEVER),
    // In split nobody can hold what is private.
    Scenario("snp-retry", IN_PLACE, NEVER),
    Scenario("tdx-retry", IN_PLACE, NEVER),
    Scenario("snp-implicit", BOTH, NEVER),
    Scenario("tdx-implicit", BOTH, NEVER),
    Scenario("snp-reset", BOTH, NEVER),
    Scenario("tdx-reset", BOTH, NEVER),
    Scenario("snp-failures", BOTH, NEVER),
    Scenario("tdx-failures", BOTH, NEVER),
    Scenario("snp-memory", BOTH, NEVER),
    Scenario("tdx-memory", BOTH, NEVER),
];

/// The agent's scenario that runs what `cargo lab host` makes.
pub const AS_A_HOST: &str = "as-a-host";

/// The agent's scenario that runs a list of programs.
pub const PROGRAMS: &str = "kernel-selftests";

/// One scenario in one mode.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// As the agent knows it.
    pub scenario: &'static str,
    pub mode: Mode,
    pub seconds: u64,
}

impl Run {
    pub fn new(scenario: &'static str, mode: Mode) -> Run {
        let seconds = LIMIT;
        Run {
            scenario,
            mode,
            seconds,
        }
    }

    /// As reports call it.
    pub fn name(&self) -> String {
        self.mode.name(self.scenario)
    }
}

/// What `test` runs on the lab's kernel.
pub fn tested() -> Vec<Run> {
    runs(|scenario| scenario.1)
}

/// What `test --full` runs on a kernel that does things as others do.
pub fn tested_foreign() -> Vec<Run> {
    let mut all = tested();
    all.retain(|run| run.mode == InPlace);
    for run in &mut all {
        run.mode = Foreign;
    }
    all
}

/// What `test --full` runs on the kernel as it came.
pub fn tested_unpatched() -> Vec<Run> {
    let mut all = tested();
    all.retain(|run| run.mode == Split && !needs_the_labs_kernel(run.scenario));
    for run in &mut all {
        run.mode = Unpatched;
    }
    all
}

/// SNP and TDX guests: nothing of a machine without the silicon launches them but patch 0009.
fn needs_the_labs_kernel(scenario: &str) -> bool {
    ["snp-", "tdx-"]
        .iter()
        .any(|kind| scenario.starts_with(kind))
}

/// Whether a filter of `test` can only mean what runs in L1: each of its parts is the name of a scenario, or says in what mode.
pub fn means_only_l1(filter: &str) -> bool {
    filter.split(',').all(|part| {
        let modes = Mode::ALL.map(|mode| mode.name(""));
        let in_mode = |mode: &String| !mode.is_empty() && part.starts_with(mode);
        modes.iter().any(in_mode) || SCENARIOS.iter().any(|row| row.0 == part)
    })
}

/// What `demo` runs.
pub fn demonstrated() -> Vec<Run> {
    runs(|scenario| scenario.2)
}

fn runs(modes: impl Fn(&Scenario) -> &'static [Mode]) -> Vec<Run> {
    let of = |mode| {
        let some = SCENARIOS.iter().filter(move |row| row.1.contains(&mode));
        some.map(move |row| (row, mode))
    };
    Mode::ALL
        .into_iter()
        .flat_map(of)
        .filter(|(row, mode)| modes(row).contains(mode))
        .map(|(row, mode)| Run::new(row.0, mode))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_demonstrated_is_tested() {
        let tested = tested();
        for run in demonstrated() {
            assert!(tested.contains(&run), "{run:?}");
        }
        for row in SCENARIOS {
            assert!(!row.1.is_empty() && row.2.iter().all(|mode| row.1.contains(mode)));
        }
    }

    #[test]
    fn a_filter_that_may_mean_other_tests_too_is_told_from_one_that_names_scenarios() {
        for filter in [
            "dump",
            "dump,in-place/suspend",
            "in-place/",
            "unpatched/native_kvm",
        ] {
            assert!(means_only_l1(filter), "{filter}");
        }
        for filter in [
            "",
            "dum",
            "dump,",
            "dump,model",
            "native_kvm",
            "place/dump",
            "in-place",
        ] {
            assert!(!means_only_l1(filter), "{filter}");
        }
    }

    #[test]
    fn modes_follow_one_another_and_names_tell_them_apart() {
        let all = tested();
        let first = all.iter().position(|run| run.mode == InPlace).unwrap();
        assert!(all[..first].iter().all(|run| run.mode == Split));
        assert!(all[first..].iter().all(|run| run.mode != Split));
        assert_eq!(all[0].name(), "stock-linux");
        assert_eq!(all[first].name(), "in-place/stock-linux");
        assert_eq!(tested_unpatched()[0].name(), "unpatched/stock-linux");
        assert_eq!(tested_foreign()[0].name(), "foreign/stock-linux");
    }
}
