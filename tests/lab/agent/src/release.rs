// SPDX-License-Identifier: MIT OR Apache-2.0
//! When the memory that pages had before they were converted is freed: what a scenario asks QEMU for (`release-delay`), and what
//! whoever checks has to expect.

/// Beyond this, in milliseconds, nobody waits for it.
const SOON_MS: u64 = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// With the conversion.
    AtOnce,
    /// Soon enough to be waited for: the default.
    Soon,
    /// Not while a scenario waits.
    Late,
}

impl Release {
    pub const ALL: [Self; 3] = [Self::AtOnce, Self::Soon, Self::Late];

    /// Of a scenario that is run with each: what its name ends in.
    pub fn named(scenario: &str) -> Self {
        let named = |release: &Self| {
            *release != Self::Soon && scenario.ends_with(&format!("-{}", release.name()))
        };
        Self::ALL.into_iter().find(named).unwrap_or(Self::Soon)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::AtOnce => "at-once",
            Self::Soon => "default",
            Self::Late => "late",
        }
    }

    /// Of a memory-backend-gmem.
    pub fn property(self) -> &'static str {
        match self {
            Self::AtOnce => ",release-delay=0",
            Self::Soon => "",
            Self::Late => ",release-delay=10000",
        }
    }

    /// What these arguments of QEMU ask for.
    pub fn of(arguments: &[&str]) -> Self {
        let delays = arguments.iter().flat_map(|word| {
            let of_each = word
                .split(',')
                .filter_map(|part| part.strip_prefix("release-delay="));
            of_each.filter_map(|text| text.parse::<u64>().ok())
        });
        match delays.max() {
            None | Some(1..=SOON_MS) => Self::Soon,
            Some(0) => Self::AtOnce,
            Some(_) => Self::Late,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Release;

    #[test]
    fn names_and_arguments_tell_when_memory_is_freed() {
        for release in Release::ALL {
            let object = format!(
                "memory-backend-gmem,id=ram0,size=1M{},max-runs=5",
                release.property()
            );
            assert_eq!(Release::of(&["-object", &object]), release);
            assert_eq!(Release::named(&format!("cut-{}", release.name())), release);
        }
        assert_eq!(Release::named("cut"), Release::Soon);
        assert_eq!(Release::of(&["x,release-delay=100"]), Release::Soon);
    }
}
