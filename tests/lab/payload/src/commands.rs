// SPDX-License-Identifier: MIT OR Apache-2.0
//! The verbs of the monitor.

use crate::bench;
use crate::cdrom;
use crate::edu::Edu;
use crate::flip;
use crate::machine_check::{self, Touched};
use crate::memory::{self, allowed, Difference};
use crate::pci::Function;
use crate::platform;
use crate::protocol::pattern;
use crate::serial::Serial;
use crate::started::{self, PORT_CALL};
use crate::suspend;
use crate::virtio::{rings_bytes, Virtio, Withdrawal};
use core::fmt::Write;
use core::ptr;
use core::sync::atomic::Ordering::Relaxed;

const MOST_WORDS: usize = 24;
const MOST_MAP_ENTRIES: usize = 32;
const MOST_RESULTS: usize = 8;
const PAGE_BYTES: u64 = 4096;

/// `ok …` was printed without the end of line, or this is what is wrong.
pub type Answer = Result<(), &'static str>;

/// The memory map of the start info, copied before anything can overwrite it.
pub struct MemoryMap {
    entries: [(u64, u64, u32); MOST_MAP_ENTRIES],
    length: usize,
}

impl MemoryMap {
    /// Reads it; empty if the start info has none.
    pub fn read(start_info: u64) -> Self {
        let mut map = MemoryMap {
            entries: [(0, 0, 0); MOST_MAP_ENTRIES],
            length: 0,
        };
        let Some(word) = started::info(start_info, 1) else {
            return map;
        };
        // SAFETY: the version says that the map is there.
        unsafe {
            let table = ptr::read_unaligned((start_info + 40) as *const u64);
            map.length = MOST_MAP_ENTRIES.min(word(48) as usize);
            for (index, entry) in map.entries[..map.length].iter_mut().enumerate() {
                let at = table + 24 * index as u64;
                *entry = (
                    ptr::read_unaligned(at as *const u64),
                    ptr::read_unaligned((at + 8) as *const u64),
                    ptr::read_unaligned((at + 16) as *const u32),
                );
            }
        }
        map
    }
}

/// Serves one request line.
pub fn answer(line: &str, map: &MemoryMap) {
    let mut words = line.split_ascii_whitespace();
    let (Some(id), Some(verb)) = (words.next(), words.next()) else {
        let _ = writeln!(Serial, "? error expected: ID VERB [ARGUMENT...]");
        return;
    };
    let _ = write!(Serial, "{id} ");
    let mut numbers = [0; MOST_WORDS];
    let mut count = 0;
    let mut outcome = Ok(());
    for word in words {
        match number(word) {
            Some(value) if count < MOST_WORDS => {
                numbers[count] = value;
                count += 1;
            }
            _ => outcome = Err("an argument is not a number, or there are too many"),
        }
    }
    let outcome = outcome.and_then(|()| run(verb, &numbers[..count], map));
    let _ = match outcome {
        Ok(()) => writeln!(Serial),
        Err(sentence) => writeln!(Serial, "error {sentence}"),
    };
}

fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => word.parse().ok(),
    }
}

/// Prints `ok …` without the end of line, or says what is wrong.
fn run(verb: &str, arguments: &[u64], map: &MemoryMap) -> Answer {
    match (verb, arguments) {
        ("ping", []) => ok(format_args!("pong")),
        ("convert", &[address, pages, attributes]) => {
            let result = memory::convert(address, pages, attributes);
            ok(format_args!("{result:#x}"))
        }
        ("port-call", &[function, first, second, third]) => {
            let (result, stopped) = memory::port_call(function, first, second, third);
            ok(format_args!("{result:#x} {stopped:#x}"))
        }
        ("convert-by-port", &[by_port @ 0..=1]) => {
            PORT_CALL.store(by_port != 0, Relaxed);
            ok(format_args!("set"))
        }
        ("storm", &[count, address, pages, attributes, stride]) => {
            storm(count, address, pages, attributes, stride)
        }
        ("fill", &[address, bytes, seed]) => {
            allowed(address, bytes)?;
            memory::fill(address, bytes, seed);
            ok(format_args!("filled"))
        }
        ("zero", &[address, bytes]) => {
            allowed(address, bytes)?;
            memory::zero(address, bytes);
            ok(format_args!("zeroed"))
        }
        ("check", &[address, bytes, seed, origin]) => {
            allowed(address, bytes)?;
            compared(memory::compare(address, bytes, |at| {
                pattern(seed, origin + (at - address))
            }))
        }
        ("check-pages", &[address, count, stride, seed]) => {
            every_page(address, count, stride, |at| pattern(seed, at))
        }
        ("zeros", &[address, bytes]) => {
            allowed(address, bytes)?;
            compared(memory::compare(address, bytes, |_| 0))
        }
        ("zero-pages", &[address, count, stride]) => every_page(address, count, stride, |_| 0),
        ("read64", &[address]) => {
            allowed(address, 8)?;
            ok(format_args!("{:#x}", memory::read(address)))
        }
        ("write64", &[address, value]) => {
            allowed(address, 8)?;
            memory::write(address, value);
            ok(format_args!("written"))
        }
        ("wrmsr", &[register, value]) => {
            machine_check::write_msr(register as u32, value);
            ok(format_args!("written"))
        }
        ("touch", &[address]) => {
            allowed(address, 8)?;
            touched(machine_check::touch(address))
        }
        ("call", &[address, argument]) => {
            allowed(address, 8)?;
            ok(format_args!("{:#x}", memory::call(address, argument)))
        }
        ("memmap", []) => memory_map(map),
        ("pci", []) => pci(),
        ("edu", &[index]) => ok(format_args!("{:#x}", Edu::find(index)?.registers())),
        ("edu-load", &[address, bytes, index]) => {
            Edu::find(index)?.load(address, bytes)?;
            ok(format_args!("done"))
        }
        ("edu-store", &[address, bytes, index]) => {
            Edu::find(index)?.store(address, bytes)?;
            ok(format_args!("done"))
        }
        ("flip", &[count, address, pages, stride, places]) => {
            flip::flip(count, address, pages, stride, places)
        }
        ("flip-each", &[processors @ 1..=4, count, address, pages, stride, first @ 0..=1]) => {
            flip::each(
                processors as usize,
                count,
                address,
                pages,
                stride,
                first != 0,
            )
        }
        ("fill-each", &[processors @ 1..=4, address, bytes, seed]) => {
            flip::fill_each(processors as usize, address, bytes, seed)
        }
        ("flip-beside-reads", &[count, address]) => flip::beside_reads(count, address),
        ("flip-beside-dma", &[trials, first, places, origin, seed, index]) => {
            flip::beside_dma(trials, first, places, origin, seed, index)
        }
        ("virtio-reset", &[kind, index, features]) => {
            let offered = Virtio::find(kind, index)?.reset(features)?;
            ok(format_args!("{offered:#x}"))
        }
        ("virtio-queue", &[kind, index, queue, rings]) => {
            let size = Virtio::find(kind, index)?.set_queue(queue, rings)?;
            ok(format_args!("{size} {:#x}", rings_bytes(size)))
        }
        ("virtio-start", &[kind, index]) => {
            Virtio::find(kind, index)?.start();
            ok(format_args!("started"))
        }
        ("virtio-offer", &[kind, index, queue, rings, ref buffers @ ..]) => {
            let before = Virtio::find(kind, index)?.offer(queue, rings, buffers)?;
            ok(format_args!("{before}"))
        }
        ("virtio-wait", &[kind, index, queue, rings, before, milliseconds]) => {
            let virtio = Virtio::find(kind, index)?;
            let used = virtio.wait(queue, rings, before, milliseconds)?;
            let word = if used.used { "used" } else { "silent" };
            ok(format_args!(
                "{word} {:#x} {}",
                virtio.status(),
                used.written
            ))
        }
        (
            "virtio-serve",
            &[kind, index, queue, rings, count, depth, milliseconds, ref buffers @ ..],
        ) => {
            let virtio = Virtio::find(kind, index)?;
            bench::timed_if(count * depth, || {
                virtio.serve(queue, rings, (count, depth), milliseconds, buffers)
            })
        }
        (
            "virtio-withdraw",
            &[kind, index, queue, rings, count, milliseconds, address, pages, seed, ref buffers @ ..],
        ) => Virtio::find(kind, index)?.withdraw(
            queue,
            rings,
            &Withdrawal {
                count,
                milliseconds,
                address,
                pages,
                seed,
            },
            buffers,
        ),
        ("page-numbers", &[address, first, count]) => {
            allowed(address, 4 * count)?;
            memory::page_numbers(address, first, count);
            ok(format_args!("written"))
        }
        ("reset", []) => {
            ok(format_args!("resetting\n"))?;
            platform::reset();
            Err("the machine did not reset")
        }
        ("sleep", []) => match suspend::suspend()? {
            true => ok(format_args!("woken")),
            false => ok(format_args!("awake")),
        },
        ("cd-read", &[address, bytes]) => {
            allowed(address, bytes)?;
            cdrom::begin(address, bytes)?;
            ok(format_args!("begun"))
        }
        ("cd-wait", &[milliseconds]) => match cdrom::ends_within(milliseconds)? {
            true => ok(format_args!("done")),
            false => ok(format_args!("busy")),
        },
        ("off", []) => {
            ok(format_args!("powering off\n"))?;
            platform::power_off();
            Err("the machine did not power off")
        }
        ("eject", &[slot @ 1..=31]) => {
            platform::eject(slot as u32);
            ok(format_args!("ejected"))
        }
        _ => bench::run(verb, arguments).unwrap_or(Err("no such verb with that many arguments")),
    }
}

/// Prints the beginning of an answer.
pub fn ok(text: core::fmt::Arguments) -> Answer {
    let _ = write!(Serial, "ok {text}");
    Ok(())
}

fn touched(touched: Touched) -> Answer {
    match touched {
        Touched::Value(value) => ok(format_args!("value {value:#x}")),
        Touched::MachineCheck(check) => ok(format_args!(
            "machine-check {:#x} {} {:#x} {:#x} {:#x}",
            check.global, check.bank, check.status, check.address, check.miscellaneous
        )),
    }
}

fn compared(difference: Option<Difference>) -> Answer {
    match difference {
        None => ok(format_args!("same")),
        Some(Difference {
            address,
            found,
            words,
        }) => ok(format_args!("differs {address:#x} {found:#x} {words}")),
    }
}

/// Compares single pages at equal distances; stops at the first that differs.
fn every_page(
    address: u64,
    count: u64,
    stride: u64,
    expected: impl Fn(u64) -> u64 + Copy,
) -> Answer {
    for index in 0..count {
        let at = address.wrapping_add(index.wrapping_mul(stride));
        allowed(at, PAGE_BYTES)?;
        let difference = memory::compare(at, PAGE_BYTES, expected);
        if difference.is_some() {
            return compared(difference);
        }
    }
    compared(None)
}

/// Many requests in a row; how often each result came.
fn storm(count: u64, address: u64, pages: u64, attributes: u64, stride: u64) -> Answer {
    let mut results = Results::default();
    for index in 0..count {
        let at = address.wrapping_add(index.wrapping_mul(stride));
        results.count(memory::convert(at, pages, attributes))?;
    }
    ok(format_args!("{count}"))?;
    results.print();
    Ok(())
}

/// How often each result of a hypercall came.
#[derive(Default)]
pub struct Results {
    seen: [(u64, u64); MOST_RESULTS],
    kinds: usize,
}

impl Results {
    /// Counts one.
    pub fn count(&mut self, result: u64) -> Answer {
        let seen = self.seen[..self.kinds].iter_mut();
        match seen.into_iter().find(|(value, _)| *value == result) {
            Some((_, times)) => *times += 1,
            None if self.kinds < MOST_RESULTS => {
                self.seen[self.kinds] = (result, 1);
                self.kinds += 1;
            }
            None => return Err("more different results than can be told apart"),
        }
        Ok(())
    }

    /// Prints ` VALUE=TIMES` for each.
    pub fn print(&self) {
        for (value, times) in &self.seen[..self.kinds] {
            let _ = write!(Serial, " {value:#x}={times}");
        }
    }
}

fn memory_map(map: &MemoryMap) -> Answer {
    ok(format_args!("{}", map.length))?;
    for (address, bytes, kind) in &map.entries[..map.length] {
        let _ = write!(Serial, " {address:#x}+{bytes:#x}:{kind}");
    }
    Ok(())
}

fn pci() -> Answer {
    ok(format_args!("functions"))?;
    for function in Function::all() {
        if let Some((vendor, device)) = function.ids() {
            let (bus, slot, number) = function.place();
            let _ = write!(
                Serial,
                " {bus:02x}:{slot:02x}.{number}={vendor:04x}:{device:04x}"
            );
        }
    }
    Ok(())
}
