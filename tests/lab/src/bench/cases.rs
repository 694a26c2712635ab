// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cases and what each is to reach, and the agent's scenarios that measure them.

use super::measure::Case;

/// One thing that a case is to reach.
pub struct Goal {
    pub what: &'static str,
    pub limit: Limit,
    pub value: fn(&Case) -> Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    AtMost(f64),
    AtLeast(f64),
    Exactly(f64),
}

impl Limit {
    pub fn holds(self, value: f64) -> bool {
        match self {
            Limit::AtMost(limit) => value <= limit,
            Limit::AtLeast(limit) => value >= limit,
            Limit::Exactly(limit) => value == limit,
        }
    }

    pub fn value(self) -> f64 {
        match self {
            Limit::AtMost(limit) | Limit::AtLeast(limit) | Limit::Exactly(limit) => limit,
        }
    }

    pub fn text(self) -> String {
        match self {
            Limit::AtMost(limit) => format!("≤ {limit}"),
            Limit::AtLeast(limit) => format!("≥ {limit}"),
            Limit::Exactly(limit) => format!("= {limit}"),
        }
    }
}

/// A row of the benchmark.
pub struct Kind {
    pub name: &'static str,
    pub what: &'static str,
    pub goals: &'static [Goal],
}

/// A kernel call for each request at most.
const ONE_MAP: Goal = Goal {
    what: "map ioctls per request",
    limit: Limit::AtMost(1.0),
    value: maps_per_request,
};
const NEAR_BARE: Goal = Goal {
    what: "time by that of the same kernel calls, bare",
    limit: Limit::AtMost(1.15),
    value: |case| case.bare_ratio("seconds"),
};
const SMALL_SLAB: Goal = Goal {
    what: "growth of the kernel's slabs, MiB",
    limit: Limit::AtMost(1.0),
    value: |case| Some(case.figure("gmem", "slab_bytes")? / f64::from(1 << 20)),
};
const NO_FAULTS: Goal = Goal {
    what: "neighbour faults",
    limit: Limit::Exactly(0.0),
    value: |case| case.fact("gmem", "dma_faults"),
};
const NEAR_BEST: Goal = Goal {
    what: "time by that of the best of MADV_POPULATE_WRITE and fallocate, with as many threads",
    limit: Limit::AtMost(1.2),
    value: |case| case.bare_ratio("seconds"),
};
const OFTEN: Goal = Goal {
    what: "requests measured",
    limit: Limit::AtLeast(20.0),
    value: |case| case.requests_in_all("gmem"),
};

const fn faster(times: f64) -> Goal {
    Goal {
        what: "stock's time by ours",
        limit: Limit::AtLeast(times),
        value: |case| case.ratio("seconds"),
    }
}

fn maps_per_request(case: &Case) -> Option<f64> {
    let requests = case.requests().filter(|&count| count > 0.0)?;
    Some(case.figure("gmem", "map_ioctls")? / requests)
}

pub const CASES: &[Kind] = &[
    Kind {
        name: "share-1g",
        what: "1 GiB to shared in requests of 2 MiB, by `cut`",
        goals: &[ONE_MAP, NEAR_BARE, faster(3.0), SMALL_SLAB],
    },
    Kind {
        name: "share-1g-unit",
        what: "the same by `unit`",
        goals: &[ONE_MAP, NEAR_BARE, faster(8.0), SMALL_SLAB],
    },
    Kind {
        name: "snp-128m",
        what: "one request of 128 MiB, by `cut`",
        goals: &[ONE_MAP, NEAR_BARE, faster(3.0), OFTEN],
    },
    Kind {
        name: "snp-128m-unit",
        what: "the same by `unit`",
        goals: &[
            Goal {
                limit: Limit::AtMost(64.0),
                ..ONE_MAP
            },
            NEAR_BARE,
            faster(8.0),
            OFTEN,
        ],
    },
    Kind {
        name: "tdx-boot",
        what: "what a Linux guest of 8 GiB asks for at boot on TDX",
        goals: &[faster(2.5), NO_FAULTS],
    },
    Kind {
        name: "snp-boot",
        what: "the same on SNP",
        goals: &[faster(2.5), NO_FAULTS],
    },
    Kind {
        name: "page-churn",
        what: "random 4 KiB pages to private and back",
        goals: &[
            Goal {
                what: "stock's p50 by ours",
                limit: Limit::AtLeast(1.3),
                value: |case| case.ratio("p50_us"),
            },
            Goal {
                what: "stock's p99 by ours",
                limit: Limit::AtLeast(1.3),
                value: |case| case.ratio("p99_us"),
            },
            Goal {
                what: "p50 by that of the kernel calls that free memory at once, bare",
                limit: Limit::AtMost(1.0),
                value: |case| case.bare_ratio("p50_us"),
            },
            Goal {
                what: "p99 by that of the kernel calls that free memory at once, bare",
                limit: Limit::AtMost(1.0),
                value: |case| case.bare_ratio("p99_us"),
            },
        ],
    },
    Kind {
        name: "churn-in-large",
        what: "the same inside one large mapping, while the device writes the neighbours",
        goals: &[
            NO_FAULTS,
            Goal {
                what: "wrong bytes",
                limit: Limit::Exactly(0.0),
                value: |case| case.fact("gmem", "wrong_bytes"),
            },
        ],
    },
    Kind {
        name: "attach",
        what: "a device is plugged in with 1 GiB shared in pieces of 2 MiB",
        goals: &[Goal {
            what: "map ioctls by areas",
            limit: Limit::Exactly(1.0),
            value: |case| {
                let areas = case.fact("gmem", "areas").filter(|&areas| areas > 0.0)?;
                Some(case.figure("gmem", "map_ioctls")? / areas)
            },
        }],
    },
    Kind {
        name: "two-vcpus",
        what: "page-churn by two vCPUs on disjoint halves",
        goals: &[
            Goal {
                what: "time by that of the kernel calls that free memory at once, from two threads",
                limit: Limit::AtMost(1.0),
                value: |case| case.bare_ratio("seconds"),
            },
            Goal {
                what: "lost bits",
                limit: Limit::Exactly(0.0),
                value: |case| case.fact("gmem", "lost_bits"),
            },
        ],
    },
    Kind {
        name: "hugetlb-storm",
        what: "4 KiB conversions all over 2 MiB pages and back",
        goals: &[
            faster(1.0),
            Goal {
                what: "huge pages that did not come back",
                limit: Limit::Exactly(0.0),
                value: |case| {
                    Some(
                        case.fact("gmem", "hugepages_free_before")?
                            - case.fact("gmem", "hugepages_free_after")?,
                    )
                },
            },
            Goal {
                what: "footprint by guest size and a huge page for each shared one",
                limit: Limit::AtMost(1.0),
                value: |case| {
                    let bound = case.fact("gmem", "footprint_bound_bytes")?;
                    Some(case.fact("gmem", "footprint_peak_bytes")? / bound)
                },
            },
        ],
    },
    Kind {
        name: "rings",
        what: "requests of a virtio disk, a kick for each",
        goals: &[faster(0.97)],
    },
    Kind {
        name: "rings-deep",
        what: "64 requests with each kick",
        goals: &[faster(0.97)],
    },
    Kind {
        name: "prealloc-shared",
        what: "4 GiB of the shared plane filled",
        goals: &[NEAR_BEST],
    },
    Kind {
        name: "prealloc-private",
        what: "4 GiB of the private plane filled",
        goals: &[NEAR_BEST],
    },
];

/// The agent's scenarios, how long each may take on a slow machine, and the cases that it measures: two that differ in our
/// side only share stock's.
pub const SCENARIOS: &[(&str, u64, &[&str])] = &[
    ("bench-share-1g", 400, &["share-1g", "share-1g-unit"]),
    ("bench-snp-128m", 300, &["snp-128m", "snp-128m-unit"]),
    ("bench-tdx-boot", 300, &["tdx-boot"]),
    ("bench-snp-boot", 300, &["snp-boot"]),
    ("bench-page-churn", 300, &["page-churn"]),
    ("bench-churn-in-large", 300, &["churn-in-large"]),
    ("bench-attach", 300, &["attach"]),
    ("bench-two-vcpus", 300, &["two-vcpus"]),
    ("bench-hugetlb-storm", 300, &["hugetlb-storm"]),
    ("bench-rings", 300, &["rings", "rings-deep"]),
    (
        "bench-prealloc",
        300,
        &["prealloc-shared", "prealloc-private"],
    ),
];

/// Cases of the kinds of memory, which have tables of their own (`planes`).
pub const PLANE_CASES: &[(&str, &str)] = &[
    ("inplace-2m", "requests of 2 MiB"),
    ("inplace-128m", "one request of 128 MiB"),
    (
        "inplace-churn",
        "4 KiB pages in shared memory to private and back",
    ),
    (
        "inplace-lend",
        "4 KiB pages in private memory to shared and back",
    ),
    ("inplace-library", "no VMM"),
    ("inplace-footprint", "the same guest doing the same"),
    ("inplace-access", "320 MiB"),
];

/// As `SCENARIOS`, of those; each runs in both modes of L1.
pub const PLANE_SCENARIOS: &[(&str, u64, &[&str])] = &[
    (
        "bench-inplace-convert",
        300,
        &[
            "inplace-2m",
            "inplace-128m",
            "inplace-churn",
            "inplace-lend",
        ],
    ),
    ("bench-inplace-library", 200, &["inplace-library"]),
    ("bench-inplace-footprint", 200, &["inplace-footprint"]),
    ("bench-inplace-access", 200, &["inplace-access"]),
];

pub fn kind(name: &str) -> Option<&'static Kind> {
    CASES.iter().find(|kind| kind.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, Value};

    fn values(name: &str, told: Value) -> Vec<Option<f64>> {
        let mut told = told;
        told["name"] = name.into();
        let case = Case::new(&told).unwrap();
        let goals = kind(name).unwrap().goals;
        goals.iter().map(|goal| (goal.value)(&case)).collect()
    }

    #[test]
    fn goals_of_a_case_read_its_figures() {
        let told = json!({
            "stock": {"runs": [9.0]},
            "gmem": {"runs": [3.0], "slab_bytes": 524288, "map_ioctls": 512},
            "bare": {"seconds": 2.0},
            "requests": 512,
        });
        assert_eq!(
            values("share-1g", told),
            [Some(1.0), Some(1.5), Some(3.0), Some(0.5)]
        );
    }

    #[test]
    fn goals_about_facts_read_our_side() {
        let told = json!({
            "stock": {"facts": {"hugepages_free_before": 9, "hugepages_free_after": 1}},
            "gmem": {"facts": {
                "hugepages_free_before": 9, "hugepages_free_after": 9,
                "footprint_peak_bytes": 50, "footprint_bound_bytes": 100,
            }},
        });
        assert_eq!(values("hugetlb-storm", told), [None, Some(0.0), Some(0.5)]);
    }

    #[test]
    fn what_was_not_measured_has_no_value() {
        for kind in CASES {
            for value in values(kind.name, json!({})) {
                assert_eq!(value, None, "{}", kind.name);
            }
        }
    }

    #[test]
    fn limits_hold_at_their_ends() {
        assert!(Limit::AtMost(1.15).holds(1.15));
        assert!(!Limit::AtMost(1.15).holds(1.16));
        assert!(Limit::AtLeast(3.0).holds(3.0));
        assert!(!Limit::Exactly(0.0).holds(1.0));
        assert!(!Limit::AtMost(1.0).holds(f64::NAN));
    }

    #[test]
    fn every_case_is_measured_by_one_scenario() {
        let measured: Vec<&str> = SCENARIOS
            .iter()
            .flat_map(|(_, _, cases)| cases.iter().copied())
            .collect();
        let all: Vec<&str> = CASES.iter().map(|kind| kind.name).collect();
        assert_eq!(measured, all);
        let measured = PLANE_SCENARIOS
            .iter()
            .flat_map(|(_, _, cases)| cases.iter().copied());
        assert!(measured.eq(PLANE_CASES.iter().map(|(name, _)| *name)));
    }
}
