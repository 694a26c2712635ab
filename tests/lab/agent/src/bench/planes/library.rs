// SPDX-License-Identifier: MIT OR Apache-2.0
//! The library without a VMM against the kernel calls that it makes, on memory of each kind.
//!
//! Before each request a guest goes in and out, untimed: after it caches are as cold as they are for a VMM.

use super::readings::{Kind, Readings};
use super::yardstick::Yardsticks;
use super::{columns, pool, Column, HUGE, MIB, PAGE};
use crate::bench::calls::{Call, Counts, Trace};
use crate::bench::contest::set_huge_shmem;
use crate::bench::kernel::{self, Ioas, Kernel, Vcpu, CODE_END};
use crate::bench::replay::{self, Step};
use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::passthrough::{all_to_vfio, EDU};
use crate::monitor::sequence::{linear, Request, WorkingSet};
use crate::scenario::{Outcome, Scenario};
use gmem::{Attribute, Block, BlockConfig, DmaSplit, Vm, Window, WindowConfig};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

const CASE: &str = "inplace-library";
const BYTES: u64 = 256 * MIB;
const BASE: u64 = 64 * MIB;
const RUNS: usize = 5;

/// Requests in an order that leaves everything private.
struct Load {
    name: &'static str,
    requests: Vec<Request>,
}

fn loads() -> Vec<Load> {
    let both = |count, pages| {
        let there = linear(BASE, count, pages, false);
        there.chain(linear(BASE, count, pages, true)).collect()
    };
    let set = WorkingSet {
        address: BASE,
        region_pages: 1 << 13,
        set: 512,
        spread: 1,
    };
    vec![
        Load {
            name: "2 MiB",
            requests: both(16, 512),
        },
        Load {
            name: "128 MiB",
            requests: both(1, 64 * 512),
        },
        Load {
            name: "4 KiB",
            requests: set.turns(300, 5, false).collect(),
        },
    ]
}

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let (mut columns, mut missing) =
        columns(&[Column::Split, Column::InPlace, Column::InPlaceHuge])?;
    set_huge_shmem(false)?;
    let devices = all_to_vfio(&EDU)?;
    let [first, second, ..] = devices.as_slice() else {
        return Err(Failure::new("L1 has too few edu devices"));
    };
    // The two sides' files.
    let _pool = pool(&mut columns, 2 * BYTES, &mut missing);
    let mut yardsticks = Yardsticks::new()?;
    let mut readings = Readings::default();
    for column in columns {
        for dma in [false, true] {
            yardsticks.take(None)?;
            let mut ours = Ours::new(column, dma.then_some(first.as_str()))?;
            let mut bare = Bare::new(column, dma.then_some(second.as_str()))?;
            for load in loads() {
                compare(&load, column, dma, &mut ours, &mut bare, &mut readings)?;
            }
            readings.tell(scenario, Some(&yardsticks), &missing);
            let with = if dma { "with" } else { "without" };
            scenario.progress(format!("{} {with} a device", column.name()));
        }
    }
    yardsticks.take(None)?;
    readings.tell(scenario, Some(&yardsticks), &missing);
    Ok(())
}

fn compare(
    load: &Load,
    column: Column,
    dma: bool,
    ours: &mut Ours,
    bare: &mut Bare,
    readings: &mut Readings,
) -> Result<(), Failure> {
    let with = if dma { ", with a device" } else { "" };
    let mut count = |calls: &[Call], own: &[Own], name: &str| {
        for private in [false, true] {
            let own = own.iter().filter(|(request, _)| request.private == private);
            let requests = own.clone().count() as u64;
            let counts = Counts::of(own.flat_map(|(_, range)| &calls[range.clone()]));
            let measure = format!("{} {}, {name}{with}", load.name, direction(private));
            readings.calls(CASE, measure, column, requests, &counts.by_name);
        }
    };
    let (calls, own) = traced(ours, load)?;
    count(&calls, &own, "library");
    // What bare makes is what the kernel saw of the library.
    let by_request: Vec<Vec<&Call>> = own
        .iter()
        .map(|(_, range)| calls[range.clone()].iter().collect())
        .collect();
    let (steps, _) = replay::steps_of(std::process::id(), &by_request)?;
    bare.steps = steps;
    let (calls, own) = traced(bare, load)?;
    count(&calls, &own, "bare");
    for _ in 0..RUNS {
        let (ours, bare) = (timed(ours, load, dma)?, timed(bare, load, dma)?);
        for private in [false, true] {
            let measure = format!("{} {}", load.name, direction(private));
            let index = usize::from(private);
            let ratio = ours[index] / bare[index];
            let what = format!("{measure}, library by bare calls{with}");
            readings.add(CASE, what, column, Kind::Ratio, ratio);
            let what = format!("{measure}, library{with}");
            readings.add(CASE, what, column, Kind::Time, ours[index]);
        }
    }
    Ok(())
}

fn direction(private: bool) -> &'static str {
    match private {
        true => "to private",
        false => "to shared",
    }
}

/// Whoever converts.
trait Side {
    fn vcpu(&self) -> &Vcpu;
    /// The request number `index` of a load.
    fn convert(&mut self, index: usize, request: &Request) -> Result<(), Failure>;
    /// Writes to shared pages.
    fn touch(&self, request: &Request);
}

/// Mean nanoseconds of a request to shared, and to private.
fn timed(side: &mut dyn Side, load: &Load, dma: bool) -> Result<[f64; 2], Failure> {
    let mut sums = [0.0; 2];
    let mut counts = [0.0; 2];
    for (number, request) in load.requests.iter().enumerate() {
        side.vcpu().visit()?;
        let begin = Instant::now();
        side.convert(number, request)?;
        let index = usize::from(request.private);
        sums[index] += begin.elapsed().as_nanos() as f64;
        counts[index] += 1.0;
        // A device's pages are there already.
        if !request.private && !dma {
            side.touch(request);
        }
    }
    Ok([sums[0] / counts[0], sums[1] / counts[1]])
}

/// A request, and which of the calls are its own.
type Own = (Request, std::ops::Range<usize>);

/// A pass under tracing: the calls of this thread, and which of them each request made.
fn traced(side: &mut dyn Side, load: &Load) -> Result<(Vec<Call>, Vec<Own>), Failure> {
    // SAFETY: takes nothing and can't fail.
    let thread = unsafe { libc::gettid() } as u32;
    let trace = Trace::start(&[thread])?;
    let result = load
        .requests
        .iter()
        .enumerate()
        .try_for_each(|(number, request)| {
            // Its KVM_RUN stands between the calls of two requests.
            side.vcpu().visit()?;
            side.convert(number, request)
        });
    let mut calls = trace.finish()?;
    result?;
    calls.retain(|call| call.thread == thread);
    let mut visits: Vec<usize> = (0..calls.len())
        .filter(|&at| calls[at].ioctl() == Some(crate::bench::calls::KVM_RUN))
        .collect();
    if visits.len() != load.requests.len() {
        return Err(Failure::new(format!(
            "{} requests, and the kernel saw {} visits of the guest",
            load.requests.len(),
            visits.len()
        )));
    }
    // What ended the trace.
    let end = calls
        .iter()
        .rposition(|call| {
            call.number == libc::SYS_ioctl as u64 || call.number == libc::SYS_fallocate as u64
        })
        .map_or(0, |last| last + 1);
    visits.push(end);
    let own = load
        .requests
        .iter()
        .zip(visits.windows(2))
        .map(|(request, pair)| (*request, pair[0] + 1..pair[1].max(pair[0] + 1)))
        .collect();
    Ok((calls, own))
}

/// The library with a VM that nobody else uses.
struct Ours {
    // Ends first: the window, then the block, then what it was shown to.
    _window: Option<Window>,
    _ioas: Option<Ioas>,
    vcpu: Vcpu,
    block: Arc<Block>,
    vm: Arc<Vm>,
    _file: OwnedFd,
}

impl Ours {
    fn new(column: Column, device: Option<&str>) -> Result<Self, Failure> {
        let file = kernel::new_vm()?;
        let vm = Vm::new(&file).attempt(|| "giving the library a VM".into())?;
        let config = BlockConfig {
            hugetlb: column.is_huge().then_some(HUGE),
            dma_split: DmaSplit::Cut,
            ..BlockConfig::confidential("ram", BYTES, Attribute::Private)
        };
        let block = Block::new(&vm, &config).attempt(|| "making a block".into())?;
        let slot = block.memslot(0).attempt(|| "asking for a slot".into())?;
        kernel::add_slot(
            &file,
            BYTES,
            slot.userspace_addr,
            slot.guest_memfd_offset,
            &slot.guest_memfd,
        )?;
        block
            .bind(0, BYTES, 0)
            .attempt(|| "binding the block".into())?
            .keep();
        vm.convert(0, CODE_END, Attribute::Shared)
            .attempt(|| "sharing the code".into())?;
        // SAFETY: the block's mapping, whose beginning is shared now.
        unsafe { kernel::write_code(block.host()) };
        let vcpu = Vcpu::new(&file, 0)?;
        let ioas = match device {
            Some(device) => Some(Ioas::new(device, false)?),
            None => None,
        };
        let window = match &ioas {
            Some(ioas) => {
                let config = WindowConfig {
                    ioas_id: ioas.id(),
                    offset: 0,
                    length: BYTES,
                    iova: 0,
                    readonly: false,
                };
                let window = block.add_window(ioas.iommufd(), &config);
                Some(window.attempt(|| "giving the device a window".into())?)
            }
            None => None,
        };
        Ok(Self {
            _window: window,
            _ioas: ioas,
            vcpu,
            block,
            vm,
            _file: file,
        })
    }
}

impl Side for Ours {
    fn vcpu(&self) -> &Vcpu {
        &self.vcpu
    }

    fn convert(&mut self, _: usize, request: &Request) -> Result<(), Failure> {
        let attribute = match request.private {
            true => Attribute::Private,
            false => Attribute::Shared,
        };
        self.vm
            .convert(request.address, request.pages * PAGE, attribute)
            .attempt(|| format!("converting {request:?}"))
    }

    fn touch(&self, request: &Request) {
        // SAFETY: pages of the block's mapping that were just converted to shared.
        unsafe {
            kernel::touch(
                self.block.host().add(request.address as usize),
                request.pages * PAGE,
            );
        }
    }
}

/// The same calls and nothing else.
struct Bare {
    vcpu: Vcpu,
    kernel: Kernel,
    /// Of each request of a load.
    steps: Vec<Vec<Step>>,
}

impl Bare {
    fn new(column: Column, device: Option<&str>) -> Result<Self, Failure> {
        let device = device.map(|device| (device, false));
        let kernel = Kernel::of(column.memory(), BYTES, device)?;
        Ok(Self {
            vcpu: kernel.vcpu(0)?,
            kernel,
            steps: Vec::new(),
        })
    }
}

impl Side for Bare {
    fn vcpu(&self) -> &Vcpu {
        &self.vcpu
    }

    fn convert(&mut self, index: usize, request: &Request) -> Result<(), Failure> {
        replay::apply(&self.kernel, request, &self.steps[index])
    }

    fn touch(&self, request: &Request) {
        self.kernel.touch(request.address, request.pages * PAGE);
    }
}
