// SPDX-License-Identifier: MIT OR Apache-2.0
//! What takes as long in one mode of L1 as in the other, but for L1's moods.

use super::timed;
use crate::bench::figures::median;
use crate::bench::guest::Guest;
use crate::bench::kernel::{Kernel, Memory, Vcpu};
use crate::failure::Failure;
use crate::host::kernel;
use serde_json::{json, Value};
use std::time::Instant;

const VISITS: u32 = 300;
const SYSTEM_CALLS: u32 = 20_000;
const STEPS: u64 = 1_000_000;
const BYTES: u64 = 2 << 20;

/// Nanoseconds of one, a value for each time that they were taken.
pub struct Yardsticks {
    // Before the vCPU's VM.
    vcpu: Vcpu,
    _kernel: Kernel,
    round_trip: Vec<f64>,
    system_call: Vec<f64>,
    guest_steps: Vec<f64>,
}

impl Yardsticks {
    pub fn new() -> Result<Self, Failure> {
        let memory = match kernel::in_place() {
            true => Memory::InPlace,
            false => Memory::Split,
        };
        let kernel = Kernel::of(memory, BYTES, None)?;
        let vcpu = kernel.vcpu(0)?;
        vcpu.visit()?;
        Ok(Self {
            vcpu,
            _kernel: kernel,
            round_trip: Vec::new(),
            system_call: Vec::new(),
            guest_steps: Vec::new(),
        })
    }

    /// Takes them once more.
    pub fn take(&mut self, guest: Option<&mut Guest>) -> Result<(), Failure> {
        let begin = Instant::now();
        for _ in 0..VISITS {
            self.vcpu.visit()?;
        }
        self.round_trip.push(per(begin, VISITS));
        let begin = Instant::now();
        for _ in 0..SYSTEM_CALLS {
            // SAFETY: takes nothing and can't fail; the C library keeps no copy of the answer.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
        self.system_call.push(per(begin, SYSTEM_CALLS));
        if let Some(guest) = guest {
            let took = timed(guest, &format!("bench-compute {STEPS}"))?;
            self.guest_steps.push(took / STEPS as f64);
        }
        Ok(())
    }

    /// Into a guest that does nothing and out again, without a VMM: what times are multiples of.
    pub fn round_trip_ns(&self) -> f64 {
        match self.round_trip.is_empty() {
            true => f64::NAN,
            false => median(&self.round_trip),
        }
    }

    pub fn json(&self) -> Value {
        json!({
            "round_trip": self.round_trip, "system_call": self.system_call, "guest_step": self.guest_steps,
        })
    }
}

fn per(begin: Instant, count: u32) -> f64 {
    begin.elapsed().as_nanos() as f64 / f64::from(count)
}
