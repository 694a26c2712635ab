// SPDX-License-Identifier: MIT OR Apache-2.0
//! One side of a case: a guest that runs the payload, its device, and what a run of requests gave.

use super::calls::{Call, Trace};
use super::times::{Exit, Times, VARIABLE};
use crate::failure::{Attempt, Failure};
use crate::host::memory::threads;
use crate::lines::Lines;
use crate::machine::{Machine, Surroundings};
use crate::monitor::protocol::SHARED_FOR_EVER_END;
use crate::monitor::Monitor;
use crate::qmp::Gmem;
use crate::scenario::Scenario;
use serde_json::json;
use std::time::{Duration, Instant};

const PAYLOAD: &str = "/lab/l2/payload.elf";
const GIB: u64 = 1 << 30;
/// Where the pc machine moves RAM above 4 GiB, and from which size on.
const LOW_END: u64 = 3 * GIB;
const ALL_LOW: u64 = 0xe000_0000;
const HIGH: u64 = 4 * GIB;
/// The one slot that devices are plugged into.
const SLOT: u64 = 5;
const DEVICE_ID: &str = "dev0";
const UNPLUG_PATIENCE: Duration = Duration::from_secs(60);
const RELEASE_PATIENCE: Duration = Duration::from_secs(60);

/// Which memory backend a guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// memory-backend-memfd with RamBlockAttributes and VFIO's own listener.
    Stock,
    /// memory-backend-gmem with this DMA strategy.
    Gmem(&'static str),
}

impl Side {
    pub fn name(self) -> String {
        match self {
            Side::Stock => "stock".into(),
            Side::Gmem(strategy) => format!("gmem-{strategy}"),
        }
    }
}

/// What a guest is made of.
#[derive(Clone, Copy)]
pub struct Plan {
    pub side: Side,
    pub ram_bytes: u64,
    pub processors: u64,
    /// Tells guests of one scenario apart that have the same side.
    pub label: &'static str,
    /// More properties of the memory backend, of either kind: `,hugetlb=on`.
    pub properties: &'static str,
    /// More arguments for QEMU.
    pub more: &'static [&'static str],
}

/// A guest under way.
pub struct Guest {
    pub side: Side,
    pub machine: Machine,
    pub monitor: Monitor,
    ram_bytes: u64,
    times: Times,
    /// PCI address of the device that belongs to this guest.
    device: String,
    plugged: bool,
}

/// One run of requests.
pub struct Run {
    pub exits: Vec<Exit>,
    /// Words of the payload's answer: requests, refused, nanoseconds in all, 50th and 99th percentile, and more.
    pub answer: Vec<u64>,
}

impl Run {
    /// Time outside the guest; with several processors that of the busiest.
    pub fn seconds(&self) -> f64 {
        let last = self.exits.iter().map(|exit| exit.vcpu).max().unwrap_or(0);
        let busiest = (0..=last)
            .map(|vcpu| {
                let own = self.exits.iter().filter(|exit| exit.vcpu == vcpu);
                own.map(Exit::nanoseconds).sum::<u64>()
            })
            .max();
        busiest.unwrap_or(0) as f64 / 1e9
    }
}

impl Guest {
    /// Starts it; no device is plugged in and all RAM is shared.
    pub fn start(scenario: &Scenario, plan: Plan, device: &str) -> Result<Self, Failure> {
        let directory = scenario
            .directory()
            .join(format!("{}{}", plan.side.name(), plan.label));
        std::fs::create_dir_all(&directory)
            .attempt(|| format!("creating {}", directory.display()))?;
        let times = Times::create(&directory.join("exit-times"))?;
        let size = plan.ram_bytes;
        let (guest, backend) = match plan.side {
            Side::Stock => (
                "sw-protected-guest,id=cgs0,stock=on",
                format!("memory-backend-memfd,id=ram0,share=on,size={size}"),
            ),
            Side::Gmem(strategy) => (
                "sw-protected-guest,id=cgs0",
                format!("memory-backend-gmem,id=ram0,size={size},dma-split={strategy}"),
            ),
        };
        let backend = format!("{backend}{}", plan.properties);
        let megabytes = format!("{}M", size >> 20);
        let processors = plan.processors.to_string();
        // The pc machine takes devices on bus 0 while it runs, and an unplug there is one port access of the guest.
        let mut arguments = vec![
            "-machine",
            "pc,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0",
            "-object",
            guest,
            "-object",
            &backend,
            "-object",
            "iommufd,id=iommufd0",
            "-m",
            &megabytes,
            "-smp",
            &processors,
            "-kernel",
            PAYLOAD,
        ];
        arguments.extend(plan.more);
        let surroundings = Surroundings {
            variables: &[(VARIABLE, times.path().as_os_str())],
            ..Surroundings::default()
        };
        let (machine, serial): (Machine, Lines) =
            Machine::start_in(&directory, &arguments, surroundings)?;
        let monitor = Monitor::new(serial)?;
        Ok(Self {
            side: plan.side,
            machine,
            monitor,
            ram_bytes: size,
            times,
            device: device.to_string(),
            plugged: false,
        })
    }

    /// Turns all RAM but the payload's own private, in requests that are as large as they may be (`max-request`). Nothing of it
    /// was touched, so no memory is behind it.
    pub fn all_private(&mut self) -> Result<(), Failure> {
        for (start, end) in ram(self.ram_bytes) {
            let mut at = start.max(SHARED_FOR_EVER_END);
            while at < end {
                let bytes = GIB.min(end - at);
                self.convert(at, bytes, true)?;
                at += bytes;
            }
        }
        Ok(())
    }

    /// A conversion that is not measured.
    pub fn convert(&mut self, address: u64, bytes: u64, private: bool) -> Result<(), Failure> {
        match self.monitor.convert(address, bytes, private)? {
            0 => Ok(()),
            result => Err(Failure::new(format!(
                "{}: turning {bytes:#x} bytes at {address:#x} {} gave {result}",
                self.side.name(),
                if private { "private" } else { "shared" },
            ))),
        }
    }

    /// Plugs the device in, the container's first; how long QEMU took.
    pub fn plug(&mut self) -> Result<Duration, Failure> {
        let arguments = json!({
            "driver": "vfio-pci", "id": DEVICE_ID, "host": self.device,
            "iommufd": "iommufd0", "bus": "pci.0", "addr": format!("{SLOT:#x}"),
        });
        let begin = Instant::now();
        self.machine.qmp.execute("device_add", arguments)?;
        self.plugged = true;
        Ok(begin.elapsed())
    }

    /// Takes the device out again, with the guest's consent.
    pub fn unplug(&mut self) -> Result<(), Failure> {
        self.machine
            .qmp
            .execute("device_del", json!({"id": DEVICE_ID}))?;
        self.monitor.ask(&format!("eject {SLOT}"))?;
        loop {
            let event = self.machine.qmp.event("DEVICE_DELETED", UNPLUG_PATIENCE)?;
            if event["data"]["device"] == DEVICE_ID {
                self.plugged = false;
                return Ok(());
            }
        }
    }

    /// Has the guest make requests. Every one must succeed.
    pub fn run(&mut self, verb: &str) -> Result<Run, Failure> {
        self.times.reset();
        let words = self.monitor.ask(verb)?;
        let answer: Vec<u64> = words
            .iter()
            .map(|word| word.parse())
            .collect::<Result<_, _>>()
            .attempt(|| format!("the answer to `{verb}` is no list of numbers: {words:?}"))?;
        let exits = self.times.take()?;
        let name = self.side.name();
        let (Some(&count), Some(&refused)) = (answer.first(), answer.get(1)) else {
            return Err(Failure::new(format!("{name}: `{verb}`: a short answer")));
        };
        if refused != 0 {
            return Err(Failure::new(format!(
                "{name}: `{verb}`: {refused} of {count} requests were refused; QEMU says: {}",
                self.machine.complaints()
            )));
        }
        if exits.len() as u64 != count {
            return Err(Failure::new(format!(
                "{name}: `{verb}`: {count} requests and {} exits",
                exits.len()
            )));
        }
        Ok(Run { exits, answer })
    }

    /// As `run`, for when some requests may be refused: how many were.
    pub fn run_refused(&mut self, verb: &str) -> Result<u64, Failure> {
        let words = self.monitor.ask(verb)?;
        words
            .get(1)
            .and_then(|word| word.parse().ok())
            .attempt(|| format!("the answer to `{verb}` has no number of refusals: {words:?}"))
    }

    /// As `run`, with the kernel recording every system call of QEMU's threads.
    pub fn run_traced(&mut self, verb: &str) -> Result<(Run, Vec<Call>), Failure> {
        let trace = Trace::start(&threads(self.machine.pid())?)?;
        let run = self.run(verb)?;
        Ok((run, trace.finish()?))
    }

    /// As `plug`, likewise.
    pub fn plug_traced(&mut self) -> Result<Vec<Call>, Failure> {
        let trace = Trace::start(&threads(self.machine.pid())?)?;
        self.plug()?;
        trace.finish()
    }

    /// The thread of each vCPU.
    pub fn vcpus(&mut self) -> Result<Vec<u32>, Failure> {
        let answer = self.machine.qmp.execute("query-cpus-fast", json!({}))?;
        answer
            .as_array()
            .and_then(|list| {
                list.iter()
                    .map(|cpu| Some(cpu["thread-id"].as_u64()? as u32))
                    .collect()
            })
            .attempt(|| format!("query-cpus-fast: {answer}"))
    }

    /// Waits until all memory that pages had before they were converted is freed.
    pub fn settle(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + RELEASE_PATIENCE;
        while let Some(gmem) = self.gmem()? {
            let double = gmem.sum("double-bytes")?;
            if double == 0 {
                break;
            }
            if Instant::now() > deadline {
                return Err(Failure::new(format!(
                    "{double} bytes are held twice for good"
                )));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// What query-gmem says; only for our side.
    pub fn gmem(&mut self) -> Result<Option<Gmem>, Failure> {
        match self.side {
            Side::Stock => Ok(None),
            Side::Gmem(_) => Gmem::query(&mut self.machine.qmp).map(Some),
        }
    }
}

/// Where the pc machine has RAM.
fn ram(bytes: u64) -> Vec<(u64, u64)> {
    match bytes {
        0..ALL_LOW => vec![(0, bytes)],
        _ => vec![(0, LOW_END), (HIGH, HIGH + bytes - LOW_END)],
    }
}

/// Of all calls, those that a request's own thread made while the request was outside the guest, request by request.
/// `vcpus` are the threads, by vCPU.
pub fn by_request<'a>(run: &Run, calls: &'a [Call], vcpus: &[u32]) -> Vec<Vec<&'a Call>> {
    let mut result = vec![Vec::new(); run.exits.len()];
    for (vcpu, &thread) in vcpus.iter().enumerate() {
        // Of one vCPU, re-entries come in the order of exits.
        let own: Vec<usize> = (0..run.exits.len())
            .filter(|&index| run.exits[index].vcpu == vcpu)
            .collect();
        for call in calls.iter().filter(|call| call.thread == thread) {
            // The trace has whole microseconds. What it puts too early or too late is KVM_RUN, which never counts.
            let begun =
                own.partition_point(|&index| run.exits[index].exit_ns / 1000 * 1000 <= call.ns);
            let Some(&index) = begun.checked_sub(1).and_then(|at| own.get(at)) else {
                continue;
            };
            if call.ns <= run.exits[index].reentry_ns {
                result[index].push(call);
            }
        }
    }
    result
}

/// What other threads did from the first exit to the last re-entry.
pub fn by_others<'a>(run: &Run, calls: &'a [Call], vcpus: &[u32]) -> Vec<&'a Call> {
    let begin = run.exits.iter().map(|exit| exit.exit_ns).min().unwrap_or(0);
    let end = run.exits.iter().map(|exit| exit.reentry_ns).max();
    calls
        .iter()
        .filter(|call| !vcpus.contains(&call.thread))
        .filter(|call| call.ns >= begin && Some(call.ns) <= end)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{by_request, ram, Run};
    use crate::bench::calls::Call;
    use crate::bench::times::Exit;

    fn exit(vcpu: usize, exit_ns: u64, reentry_ns: u64) -> Exit {
        Exit {
            exit_ns,
            reentry_ns,
            address: 0,
            pages: 1,
            vcpu,
        }
    }

    fn call(thread: u32, ns: u64) -> Call {
        Call {
            thread,
            ns,
            number: 1,
            arguments: [0; 6],
        }
    }

    #[test]
    fn calls_belong_to_the_request_that_their_thread_had() {
        let run = Run {
            exits: vec![
                exit(0, 1_500, 9_000),
                exit(1, 2_000, 30_000),
                exit(0, 20_100, 25_900),
            ],
            answer: Vec::new(),
        };
        let calls = [
            call(7, 0),
            call(7, 1_000),
            call(8, 3_000),
            call(7, 10_000),
            call(7, 25_000),
            call(9, 5_000),
        ];
        let counts: Vec<usize> = by_request(&run, &calls, &[7, 8])
            .iter()
            .map(Vec::len)
            .collect();
        assert_eq!(counts, [1, 1, 1]);
        assert_eq!(run.seconds(), 28_000.0 / 1e9);
    }

    #[test]
    fn large_guests_have_a_hole_below_4_gib() {
        assert_eq!(ram(1 << 30), [(0, 1 << 30)]);
        let large = ram(8 << 30);
        let bytes: u64 = large.iter().map(|(start, end)| end - start).sum();
        assert_eq!((large.len(), bytes), (2, 8 << 30));
    }
}
