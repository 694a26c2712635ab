// SPDX-License-Identifier: MIT OR Apache-2.0
//! COM1: lines in, lines out. The processor sleeps while nothing comes; polling would be an exit per look. Where no interrupt
//! tells of a byte, it is woken by a timer.

use crate::port::{in8, out8};
use crate::{interrupts, started};
use core::fmt;

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;

/// Longest request; what is beyond it is dropped, and the request then fails to parse.
pub const LINE_BYTES: usize = 256;

/// Where the line is polled: how often at once before the first sleep, which is enough for what follows a byte, and how long a
/// sleep is: 4 ms of a TD's timer of 25 MHz.
const LOOKS: u32 = 500;
const ALARM_TICKS: u32 = 100_000;

/// The port, for `write!`.
pub struct Serial;

/// 8n1, FIFO on, an interrupt per byte received.
pub fn start() {
    out8(COM1 + 1, 0);
    out8(COM1 + 3, 0x80);
    out8(COM1, 1);
    out8(COM1 + 1, 0);
    out8(COM1 + 3, 0x03);
    out8(COM1 + 2, 0x07);
    out8(COM1 + 4, 0x0b);
    out8(COM1 + 1, 0x01);
}

fn wait_for_byte() -> u8 {
    let mut looks = 0;
    loop {
        if in8(LINE_STATUS) & 1 != 0 {
            return in8(COM1);
        }
        if started::polls() {
            looks += 1;
            if looks < LOOKS {
                continue;
            }
            interrupts::set_alarm(ALARM_TICKS);
        }
        // A byte that comes between the look and the sleep still wakes it.
        interrupts::sleep();
    }
}

/// The next line without its end.
pub fn read_line(buffer: &mut [u8; LINE_BYTES]) -> &str {
    let mut length = 0;
    loop {
        match wait_for_byte() {
            b'\n' | b'\r' if length > 0 => break,
            b'\n' | b'\r' => {}
            byte if length < LINE_BYTES => {
                buffer[length] = byte;
                length += 1;
            }
            _ => {}
        }
    }
    core::str::from_utf8(&buffer[..length]).unwrap_or("")
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while in8(LINE_STATUS) & 0x20 == 0 {}
            out8(COM1, byte);
        }
        Ok(())
    }
}
