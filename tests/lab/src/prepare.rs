// SPDX-License-Identifier: MIT OR Apache-2.0
//! From an empty machine to everything that L0 boots. Kernel and QEMU are fetched and built side by side: where one waits
//! for the network or runs a serial step, the other has the processors.

use crate::cache::Cache;
use crate::firmware::{self, Firmware};
use crate::images::{self, Extra, Images, Programs};
use crate::kernel::{self, Kernel};
use crate::process::Logs;
use crate::qemu::{Qemu, Recipe};
use crate::sources::{Source, Sources};
use crate::{host, interrupt, patches, tree::Tree};
use anyhow::{anyhow, bail, Error, Result};
use std::path::PathBuf;
use std::sync::Mutex;

/// A cold cache grows to about this: sources, objects, products.
const COLD_BYTES: u64 = 6 << 30;
/// What an incremental build may add.
const WARM_BYTES: u64 = 1 << 30;

pub struct Choices {
    pub qemu_src: Option<PathBuf>,
    pub kernel_src: Option<PathBuf>,
    pub unpatched_kernel: bool,
    pub kernel_option: String,
    pub cache: Option<PathBuf>,
}

/// The place of everything, opened once per run.
pub struct Ground {
    pub tree: Tree,
    pub cache: Cache,
    pub logs: Logs,
    pub choices: Choices,
}

impl Ground {
    pub fn open(choices: Choices) -> Result<Ground> {
        let tree = Tree::find()?;
        let cache = Cache::open(choices.cache.as_deref())?;
        let logs = Logs::new(tree.results().join("logs"));
        Ok(Ground {
            tree,
            cache,
            logs,
            choices,
        })
    }
}

/// Everything built.
pub struct Prepared {
    pub kernel: Kernel,
    pub kernel_source: Source,
    pub qemu: Qemu,
    pub qemu_source: Source,
    pub firmware: Firmware,
    pub programs: Programs,
    pub images: Images,
}

/// Fetches and builds what is missing.
pub fn prepare(ground: &Ground) -> Result<Prepared> {
    let Ground {
        tree,
        cache,
        logs,
        choices,
    } = ground;
    let cold = !cache.work("kernel").exists() || !cache.work("qemu").exists();
    cache.require_space(if cold { COLD_BYTES } else { WARM_BYTES })?;
    host::prepare(logs)?;
    let sources = Sources::new(cache, logs);
    let race = Race::default();
    let (kernel_side, qemu_side) = std::thread::scope(|scope| {
        let kernel = scope.spawn(|| {
            race.run(|| {
                let source = sources.linux(choices.kernel_src.as_deref())?;
                let series = match choices.unpatched_kernel || kernel::converts_in_place(&source) {
                    true => Vec::new(),
                    false => patches::series(&tree.kernel_series())?,
                };
                let fragment = tree.kernel_fragment();
                let kernel = kernel::build(cache, logs, &source, &fragment, &series)?;
                Ok((source, kernel))
            })
        });
        let qemu = scope.spawn(|| {
            race.run(|| {
                let source = sources.qemu(choices.qemu_src.as_deref())?;
                let firmware = firmware::prepare(&sources)?;
                let programs = images::programs(cache, logs, tree)?;
                let qemu = Recipe::new(cache, logs, tree, &source)?.build()?;
                Ok((source, firmware, programs, qemu))
            })
        });
        (kernel.join(), qemu.join())
    });
    interrupt::check_signal()?;
    let (Ok(Some((kernel_source, kernel))), Ok(Some((qemu_source, firmware, programs, qemu)))) =
        (kernel_side, qemu_side)
    else {
        return Err(race.error());
    };
    let images = images::pack(cache, &kernel, &qemu, &firmware, &programs, None)?;
    Ok(Prepared {
        kernel,
        kernel_source,
        qemu,
        qemu_source,
        firmware,
        programs,
        images,
    })
}

/// Two sides at work; when one fails the other stops, and the first error is the one to show.
#[derive(Default)]
struct Race {
    first: Mutex<Option<Error>>,
}

impl Race {
    fn run<T>(&self, work: impl FnOnce() -> Result<T>) -> Option<T> {
        match work() {
            Ok(value) => Some(value),
            Err(error) => {
                if let Ok(mut first) = self.first.lock() {
                    first.get_or_insert(error);
                }
                interrupt::abandon();
                None
            }
        }
    }

    fn error(self) -> Error {
        self.first
            .into_inner()
            .ok()
            .flatten()
            .unwrap_or_else(|| anyhow!("a step of the preparation ended without saying why"))
    }
}

/// L1 with the QEMU that the benchmark compares two halves of: the series and the patches of `tests/lab/bench`.
pub fn for_benchmark(ground: &Ground, prepared: &Prepared) -> Result<(Qemu, Images)> {
    let Ground {
        tree, cache, logs, ..
    } = ground;
    let folder = tree.lab("bench");
    let patches = patches::series(&folder)?;
    if patches.is_empty() {
        bail!(
            "{} has no patch: stock QEMU can't run beside ours without",
            folder.display()
        );
    }
    let recipe = Recipe::new(cache, logs, tree, &prepared.qemu_source)?.with_benchmark(patches);
    let qemu = recipe.build()?;
    let images = images::pack(
        cache,
        &prepared.kernel,
        &qemu,
        &prepared.firmware,
        &prepared.programs,
        None,
    )?;
    Ok((qemu, images))
}

/// L1 on the kernel as it came.
pub fn with_unpatched_kernel(
    ground: &Ground,
    prepared: &Prepared,
    extra: Option<&Extra>,
) -> Result<Images> {
    let Ground {
        tree, cache, logs, ..
    } = ground;
    let source = &prepared.kernel_source;
    let kernel = kernel::build(cache, logs, source, &tree.kernel_fragment(), &[])?;
    images::pack(
        cache,
        &kernel,
        &prepared.qemu,
        &prepared.firmware,
        &prepared.programs,
        extra,
    )
}

/// L1 with more in it than the scenarios need.
pub fn with_extra(ground: &Ground, prepared: &Prepared, extra: &Extra) -> Result<Images> {
    images::pack(
        &ground.cache,
        &prepared.kernel,
        &prepared.qemu,
        &prepared.firmware,
        &prepared.programs,
        Some(extra),
    )
}
