// SPDX-License-Identifier: MIT OR Apache-2.0
//! A kernel that keeps no attributes per VM, as one built without CONFIG_KVM_VM_MEMORY_ATTRIBUTES. Where it converts in
//! place, a confidential guest runs as on any such kernel. Where that is switched off, it has no private memory at all, and
//! who asks for some is told which switch it is.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Attempt;
use crate::host::kernel::{self, Foreign, NO_VM_ATTRIBUTES};
use crate::machine::Machine;
use crate::scenario::{Outcome, Scenario};
use std::fs;

const MIB: u64 = 1 << 20;
const START: u64 = 16 * MIB;
const CURE: &str = "kvm.gmem_in_place_conversion=1";
const MACHINE: &str = "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0";

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let Some(_ways) = Foreign::ways(NO_VM_ATTRIBUTES)? else {
        scenario.fact("skipped", "this kernel can't do without its attributes");
        return Ok(());
    };
    match kernel::in_place() {
        true => works(scenario),
        false => is_refused(scenario),
    }
}

fn works(scenario: &mut Scenario) -> Outcome {
    let mut guest = Confidential::with_one_block(scenario.directory(), 64 * MIB, "", &[])?;
    guest.convert(scenario, START, MIB, true)?;
    guest.fill(START, MIB, 7)?;
    guest.agree(scenario, "private on a kernel without attributes per VM")?;
    guest.convert(scenario, START, MIB, false)?;
    guest.agree_but_kernel(scenario, "shared again")?;
    guest.finish(scenario)
}

fn is_refused(scenario: &mut Scenario) -> Outcome {
    for (what, guest, object) in [
        ("auto", "", "memory-backend-gmem,id=ram0,size=64M"),
        (
            "split",
            "",
            "memory-backend-gmem,id=ram0,size=64M,backing=split",
        ),
        (
            "in-place",
            "",
            "memory-backend-gmem,id=ram0,size=64M,backing=in-place",
        ),
        (
            "ram=private",
            ",ram=private,image=/lab/l2/payload.elf",
            "memory-backend-gmem,id=ram0,size=64M",
        ),
    ] {
        let guest = format!("sw-protected-guest,id=cgs0{guest}");
        let said = Machine::refusal(
            scenario.directory(),
            &[
                "-object", &guest, "-object", object, "-m", "64M", "-machine", MACHINE,
            ],
        )?;
        scenario.fact(what, said.clone());
        // A hint is a line of its own.
        let path = scenario.directory().join("qemu.stderr");
        let text = fs::read_to_string(&path).attempt(|| format!("reading {}", path.display()))?;
        scenario.check(
            text.contains(CURE),
            format!("{what}: the refusal names {CURE}: {text}"),
        )?;
    }
    // Ordinary guests have nothing to do with it.
    let (mut machine, _serial) = Machine::start(
        scenario.directory(),
        &[
            "-object",
            "memory-backend-gmem,id=ram0,size=64M",
            "-m",
            "64M",
            "-machine",
            "q35,accel=kvm,memory-backend=ram0",
        ],
    )?;
    let ended = machine.exited()?;
    scenario.check_equal(ended, None, "how an ordinary VM ended, if it did")
}
