// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that does what it is told: converts memory, fills and checks it, drives a DMA engine, answers on COM1.
//!
//! Its own memory stays shared for ever (see `link.ld`); everything else is for the requests to play with.
#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

mod bench;
mod boot;
mod cdrom;
mod commands;
mod edu;
mod flip;
// The firmware and the builder of its images take the rest of it.
#[allow(dead_code)]
mod handover;
mod interrupts;
mod machine_check;
mod memory;
mod pci;
mod platform;
mod port;
// The other side of the line uses the rest of it.
#[allow(dead_code)]
mod protocol;
mod real_mode;
// L1 takes the rest of it.
#[allow(dead_code)]
mod sequence;
mod serial;
mod smp;
mod started;
mod suspend;
mod virtio;

use core::fmt::Write;
use serial::Serial;

#[no_mangle]
extern "C" fn main(start_info: u64) -> ! {
    started::read(start_info);
    serial::start();
    interrupts::start();
    smp::invite();
    let memory_map = commands::MemoryMap::read(start_info);
    let _ = writeln!(Serial, "\n{}", protocol::READY);
    let mut buffer = [0; serial::LINE_BYTES];
    loop {
        let line = serial::read_line(&mut buffer);
        commands::answer(line, &memory_map);
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    let _ = writeln!(Serial, "\npanic {info}");
    interrupts::stop()
}

/// The precompiled core library names it in its unwind tables; nothing here unwinds.
#[no_mangle]
extern "C" fn rust_eh_personality() {}
