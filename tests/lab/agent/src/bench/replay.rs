// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel calls of a run again, without a VMM: what a conversion can't be faster than.
//!
//! Which calls a request needs is not assumed but taken from a traced run of ours, request by request, and the replay is
//! traced in turn: when the counts differ the case fails.

use super::calls::{
    Call, Counts, Trace, IOMMU_IOAS_MAP_FILE, IOMMU_IOAS_UNMAP, IOMMU_VFIO_IOAS,
    KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_MEMORY_ATTRIBUTES2, SYS_FALLOCATE, SYS_MADVISE,
    VFIO_IOMMU_UNMAP_DMA,
};
use super::figures::Figures;
use super::kernel::{Kernel, Plane, Vcpu};
use crate::failure::{Attempt, Failure};
use crate::monitor::sequence::Request;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::Instant;

const PAGE: u64 = 4096;

/// One call of a request. Ranges are equal shares of the request's, one call after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Map,
    Unmap,
    Cut,
    NameIoas,
    Attributes,
    Fallocate(Plane, i32),
    Madvise(i32),
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// What a request comes to when nothing is measured: a setup needs the state and not the calls.
pub fn plain(request: &Request, unit_pages: Option<u64>) -> Vec<Step> {
    match (request.private, unit_pages) {
        (true, None) => vec![
            Step::NameIoas,
            Step::Cut,
            Step::Attributes,
            Step::Fallocate(Plane::Shared, PUNCH),
        ],
        (true, Some(_)) => vec![
            Step::Unmap,
            Step::Attributes,
            Step::Fallocate(Plane::Shared, PUNCH),
        ],
        (false, unit) => {
            let pieces = unit.map_or(1, |unit| request.pages.div_ceil(unit));
            let mut steps = vec![Step::Map; pieces as usize];
            steps.extend([Step::Attributes, Step::Fallocate(Plane::Private, PUNCH)]);
            steps
        }
    }
}

/// How often each call came, by name.
pub type Counted = BTreeMap<String, u64>;

/// The traced calls of each request as steps, and how often what could not be replayed came.
pub fn steps_of(pid: u32, requests: &[Vec<&Call>]) -> Result<(Vec<Vec<Step>>, Counted), Failure> {
    let mut left_out = BTreeMap::new();
    let mut planes = BTreeMap::new();
    let mut all = Vec::with_capacity(requests.len());
    for calls in requests {
        let mut steps = Vec::new();
        for call in calls {
            let step = match (call.number, call.ioctl()) {
                (_, Some(IOMMU_IOAS_MAP_FILE)) => Some(Step::Map),
                (_, Some(IOMMU_IOAS_UNMAP)) => Some(Step::Unmap),
                (_, Some(VFIO_IOMMU_UNMAP_DMA)) => Some(Step::Cut),
                (_, Some(IOMMU_VFIO_IOAS)) => Some(Step::NameIoas),
                (_, Some(KVM_SET_MEMORY_ATTRIBUTES | KVM_SET_MEMORY_ATTRIBUTES2)) => {
                    Some(Step::Attributes)
                }
                (SYS_FALLOCATE, _) => {
                    let fd = call.arguments[0];
                    let plane = match planes.get(&fd) {
                        Some(plane) => *plane,
                        None => {
                            let plane = plane(pid, fd)?;
                            planes.insert(fd, plane);
                            plane
                        }
                    };
                    Some(Step::Fallocate(plane, call.arguments[1] as i32))
                }
                (SYS_MADVISE, _) => Some(Step::Madvise(call.arguments[2] as i32)),
                _ => None,
            };
            match step {
                Some(step) => steps.push(step),
                None if Counts::of(std::iter::once(*call)).other == 0 => {}
                None => *left_out.entry(call.name()).or_insert(0) += 1,
            }
        }
        all.push(steps);
    }
    Ok((all, left_out))
}

fn plane(pid: u32, fd: u64) -> Result<Plane, Failure> {
    let path = format!("/proc/{pid}/fd/{fd}");
    let target = fs::read_link(&path).attempt(|| format!("reading {path}"))?;
    Ok(match target.to_string_lossy().contains("[kvm-gmem]") {
        true => Plane::Private,
        false => Plane::Shared,
    })
}

/// Does a request's steps.
pub fn apply(kernel: &Kernel, request: &Request, steps: &[Step]) -> Result<(), Failure> {
    let mut positions: Vec<(Step, u64, u64)> = Vec::new();
    for &step in steps {
        let at = positions.iter().position(|(known, ..)| *known == step);
        let at = at.unwrap_or_else(|| {
            let times = steps.iter().filter(|other| **other == step).count() as u64;
            positions.push((step, 0, request.pages.div_ceil(times) * PAGE));
            positions.len() - 1
        });
        let (_, done, share) = &mut positions[at];
        let address = request.address + *done;
        let bytes = (*share).min(request.pages * PAGE - *done);
        *done += bytes;
        perform(kernel, request, step, address, bytes)
            .attempt(|| format!("the replay's {step:?} of {bytes:#x} bytes at {address:#x}"))?;
    }
    Ok(())
}

fn perform(
    kernel: &Kernel,
    request: &Request,
    step: Step,
    address: u64,
    bytes: u64,
) -> io::Result<()> {
    match step {
        Step::Map => kernel.map(address, bytes),
        Step::Unmap => kernel.unmap(address, bytes),
        Step::Cut => kernel.cut(address, bytes),
        Step::NameIoas => kernel.name_ioas(),
        Step::Attributes => kernel.set_attributes(address, bytes, request.private),
        Step::Fallocate(plane, mode) => kernel.fallocate(plane, mode, address, bytes),
        Step::Madvise(advice) => kernel.madvise(advice, address, bytes),
    }
}

/// Requests and what each is made of.
#[derive(Clone)]
pub struct Script {
    pub requests: Vec<Request>,
    pub steps: Vec<Vec<Step>>,
}

impl Script {
    /// Pairs a sequence with the traced steps of the same sequence.
    pub fn new(requests: Vec<Request>, steps: Vec<Vec<Step>>) -> Result<Self, Failure> {
        if requests.len() != steps.len() {
            return Err(Failure::new(format!(
                "a sequence of {} requests was traced as {}",
                requests.len(),
                steps.len()
            )));
        }
        Ok(Self { requests, steps })
    }

    /// Adds the call that frees what a request's pages had before, where it was put off: without a way to put it off, everybody
    /// must make it. How many were added.
    pub fn free_at_once(&mut self) -> u64 {
        let mut added = 0;
        for (request, steps) in self.requests.iter().zip(&mut self.steps) {
            let free = |step: &Step| matches!(step, Step::Fallocate(_, PUNCH));
            if !steps.contains(&Step::Attributes) || steps.iter().any(free) {
                continue;
            }
            let plane = match request.private {
                true => Plane::Shared,
                false => Plane::Private,
            };
            steps.push(Step::Fallocate(plane, PUNCH));
            added += 1;
        }
        added
    }

    /// Replays it; nanoseconds of each request. The guest goes in and out before each, which is not timed: after it caches
    /// are as cold as they are for a VMM.
    pub fn run(&self, kernel: &Kernel, vcpu: Option<&Vcpu>) -> Result<Vec<u64>, Failure> {
        let mut times = Vec::with_capacity(self.requests.len());
        for (request, steps) in self.requests.iter().zip(&self.steps) {
            if let Some(vcpu) = vcpu {
                vcpu.visit()?;
            }
            let begin = Instant::now();
            apply(kernel, request, steps)?;
            times.push(begin.elapsed().as_nanos() as u64);
        }
        Ok(times)
    }

    /// Replays it under tracing and holds what the kernel saw against what it saw of ours.
    pub fn verify(&self, kernel: &Kernel) -> Result<(), Failure> {
        // SAFETY: takes nothing and can't fail.
        let thread = unsafe { libc::gettid() } as u32;
        let trace = Trace::start(&[thread])?;
        let result = self.run(kernel, None);
        let calls = trace.finish()?;
        result?;
        let seen = Counts::of(calls.iter().filter(|call| call.thread == thread));
        for (name, expected) in counts(std::slice::from_ref(self)) {
            let got = seen.by_name.get(&name).copied().unwrap_or(0);
            if got != expected {
                return Err(Failure::new(format!(
                    "the replay made {got} calls of {name} where ours made {expected}"
                )));
            }
        }
        Ok(())
    }
}

/// How often each call comes, by the name that the trace has for it.
pub fn counts(scripts: &[Script]) -> Counted {
    let mut counts = BTreeMap::new();
    for step in scripts
        .iter()
        .flat_map(|script| script.steps.iter().flatten())
    {
        *counts.entry(name(*step).to_string()).or_insert(0) += 1;
    }
    counts
}

fn name(step: Step) -> &'static str {
    match step {
        Step::Map => "IOMMU_IOAS_MAP_FILE",
        Step::Unmap => "IOMMU_IOAS_UNMAP",
        Step::Cut => "VFIO_IOMMU_UNMAP_DMA",
        Step::NameIoas => "IOMMU_VFIO_IOAS",
        Step::Attributes => "KVM_SET_MEMORY_ATTRIBUTES",
        Step::Fallocate(..) => "fallocate",
        Step::Madvise(_) => "madvise",
    }
}

/// Several scripts at once, a thread and a vCPU each, if there are any; the times of each.
pub fn run_parallel(
    scripts: &[Script],
    kernel: &Kernel,
    vcpus: &[Vcpu],
) -> Result<Vec<Vec<u64>>, Failure> {
    let start = std::sync::Barrier::new(scripts.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = scripts
            .iter()
            .enumerate()
            .map(|(index, script)| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    script.run(kernel, vcpus.get(index))
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a replay does not panic"))
            .collect()
    })
}

/// Adds a replayed run to the figures: the busiest thread's time, as for a guest.
pub fn record(figures: &mut Figures, threads: &[Vec<u64>]) {
    let busiest = threads.iter().map(|times| times.iter().sum::<u64>()).max();
    figures.runs.push(busiest.unwrap_or(0) as f64 / 1e9);
    figures.requests.extend(threads.iter().flatten());
}
