// SPDX-License-Identifier: MIT OR Apache-2.0
//! The other end of the payload's line: one method per verb, every answer checked.

use crate::failure::{Attempt, Failure};
use crate::lines::Lines;
use crate::place;
use std::time::Duration;

// The payload's side uses the rest of it.
#[allow(dead_code)]
#[path = "../../payload/src/protocol.rs"]
pub mod protocol;
#[path = "../../payload/src/sequence.rs"]
pub mod sequence;

/// The longest verb is a storm: 100,000 exits through two levels of emulated virtualisation.
const PATIENCE: Duration = Duration::from_secs(900);
const BOOT_PATIENCE: Duration = Duration::from_secs(180);

/// A guest that runs the payload.
pub struct Monitor {
    lines: Lines,
    next_id: u64,
}

/// A request whose answer has not been waited for.
pub struct Begun {
    id: u64,
    request: String,
}

/// What `flip_beside_dma` saw.
#[derive(Debug)]
pub struct BesideDma {
    /// Writes that did not arrive whole.
    pub lost: u64,
    pub wrong_words: u64,
    /// How often each result of the conversions came.
    pub results: Vec<(i64, u64)>,
}

/// What became of a read that may meet a memory error.
#[derive(Debug)]
pub enum Touched {
    Value,
    MachineCheck(MachineCheck),
}

/// What the guest's machine-check registers said.
#[derive(Debug)]
pub struct MachineCheck {
    /// Of all banks.
    pub global: u64,
    pub bank: u64,
    pub status: u64,
    pub address: u64,
}

impl Monitor {
    /// Waits until the payload is up.
    pub fn new(lines: Lines) -> Result<Self, Failure> {
        let mut monitor = Self { lines, next_id: 1 };
        monitor.wait_until_ready()?;
        Ok(monitor)
    }

    /// Waits for the line that the payload prints after each start.
    pub fn wait_until_ready(&mut self) -> Result<(), Failure> {
        self.lines.find(
            place::patience(BOOT_PATIENCE),
            "the payload's start",
            |line| (line == protocol::READY).then_some(()),
        )
    }

    /// Sends a request; the words after `ok`.
    pub fn ask(&mut self, request: &str) -> Result<Vec<String>, Failure> {
        let begun = self.begin(request)?;
        self.end(begun)
    }

    /// Sends a request and does not wait, so that something else can happen while the guest is at it.
    pub fn begin(&mut self, request: &str) -> Result<Begun, Failure> {
        let id = self.next_id;
        self.next_id += 1;
        self.lines.send(&format!("{id} {request}"))?;
        Ok(Begun {
            id,
            request: request.to_string(),
        })
    }

    /// Waits for the answer to what was begun; the words after `ok`.
    pub fn end(&mut self, begun: Begun) -> Result<Vec<String>, Failure> {
        let Begun { id, request } = begun;
        let request = request.as_str();
        let prefix = format!("{id} ");
        let answer =
            self.lines
                .find(PATIENCE, request, |line| match line.strip_prefix(&prefix) {
                    Some(answer) => Some(Ok(answer.to_string())),
                    None if line == protocol::READY => Some(Err(Failure::new(format!(
                        "the guest started anew instead of answering `{request}`"
                    )))),
                    None if line.starts_with("exception ") || line.starts_with("panic ") => {
                        Some(Err(Failure::new(format!(
                            "the guest died of `{request}`: {line}"
                        ))))
                    }
                    None => None,
                })??;
        match answer.strip_prefix("ok") {
            Some(words) => Ok(words.split_ascii_whitespace().map(String::from).collect()),
            None => Err(Failure::new(format!(
                "the guest refused `{request}`: {answer}"
            ))),
        }
    }

    /// As `ask`, where the answer is a number.
    pub fn ask_number(&mut self, request: &str) -> Result<u64, Failure> {
        number(self.ask(request)?.first())
    }

    pub fn read(&mut self, address: u64) -> Result<u64, Failure> {
        self.ask_number(&format!("read64 {address:#x}"))
    }

    pub fn write(&mut self, address: u64, value: u64) -> Result<(), Failure> {
        self.ask(&format!("write64 {address:#x} {value:#x}"))
            .map(|_| ())
    }

    /// Converts through the hypercall; what it returned in RAX, as signed as KVM means it.
    pub fn convert(&mut self, address: u64, bytes: u64, private: bool) -> Result<i64, Failure> {
        let pages = bytes / 4096;
        self.convert_raw(address, pages, attributes(private))
    }

    /// The hypercall with arguments of any kind.
    pub fn convert_raw(
        &mut self,
        address: u64,
        pages: u64,
        attributes: u64,
    ) -> Result<i64, Failure> {
        let words = self.ask(&format!("convert {address:#x} {pages:#x} {attributes:#x}"))?;
        number(words.first()).map(|value| value as i64)
    }

    /// The port call of an SNP or TDX guest: a function with three arguments; what it left in RAX and RBX.
    pub fn port_call(&mut self, function: u64, arguments: [u64; 3]) -> Result<(u64, u64), Failure> {
        let [first, second, third] = arguments;
        let words = self.ask(&format!(
            "port-call {function:#x} {first:#x} {second:#x} {third:#x}"
        ))?;
        Ok((number(words.first())?, number(words.get(1))?))
    }

    /// Whether KVM has a page for private, says the guest.
    pub fn is_private(&mut self, address: u64) -> Result<bool, Failure> {
        let (result, _) = self.port_call(protocol::CALL_GET_KIND, [address, 0, 0])?;
        Ok(result != 0)
    }

    /// From now on accesses to a range are of one kind, whatever its attributes; `None` has them follow those again.
    pub fn set_kind(
        &mut self,
        address: u64,
        bytes: u64,
        private: Option<bool>,
    ) -> Result<(), Failure> {
        let kind = match private {
            None => protocol::KIND_BY_ATTRIBUTE,
            Some(true) => protocol::KIND_PRIVATE,
            Some(false) => protocol::KIND_SHARED,
        };
        match self.port_call(protocol::CALL_SET_KIND, [address, bytes / 4096, kind])? {
            (0, _) => Ok(()),
            (result, _) => Err(Failure::new(format!(
                "KVM does not set the kind of {address:#x}: {}",
                result as i64
            ))),
        }
    }

    /// Many hypercalls in a row; how often each result came.
    pub fn storm(
        &mut self,
        count: u64,
        address: u64,
        bytes: u64,
        private: bool,
        stride: u64,
    ) -> Result<Vec<(i64, u64)>, Failure> {
        let words = self.ask(&format!(
            "storm {count} {address:#x} {:#x} {:#x} {stride:#x}",
            bytes / 4096,
            attributes(private)
        ))?;
        results(words.get(1..).unwrap_or_default())
    }

    pub fn fill(&mut self, address: u64, bytes: u64, seed: u64) -> Result<(), Failure> {
        self.ask(&format!("fill {address:#x} {bytes:#x} {seed}"))
            .map(|_| ())
    }

    pub fn zero(&mut self, address: u64, bytes: u64) -> Result<(), Failure> {
        self.ask(&format!("zero {address:#x} {bytes:#x}"))
            .map(|_| ())
    }

    /// None if the range holds the pattern of `seed`; else what the guest found.
    pub fn check(
        &mut self,
        address: u64,
        bytes: u64,
        seed: u64,
    ) -> Result<Option<String>, Failure> {
        self.check_copy(address, bytes, seed, address)
    }

    /// As `check`, for bytes that were the pattern at `origin` and have been copied here.
    pub fn check_copy(
        &mut self,
        address: u64,
        bytes: u64,
        seed: u64,
        origin: u64,
    ) -> Result<Option<String>, Failure> {
        let words = self.ask(&format!("check {address:#x} {bytes:#x} {seed} {origin:#x}"))?;
        Ok(difference(&words))
    }

    /// None if the range is all zeros; else what the guest found.
    pub fn zeros(&mut self, address: u64, bytes: u64) -> Result<Option<String>, Failure> {
        let words = self.ask(&format!("zeros {address:#x} {bytes:#x}"))?;
        Ok(difference(&words))
    }

    /// As `check`, for single pages at equal distances.
    pub fn check_pages(
        &mut self,
        address: u64,
        count: u64,
        stride: u64,
        seed: u64,
    ) -> Result<Option<String>, Failure> {
        let words = self.ask(&format!(
            "check-pages {address:#x} {count} {stride:#x} {seed}"
        ))?;
        Ok(difference(&words))
    }

    /// As `zeros`, for single pages at equal distances.
    pub fn zero_pages(
        &mut self,
        address: u64,
        count: u64,
        stride: u64,
    ) -> Result<Option<String>, Failure> {
        let words = self.ask(&format!("zero-pages {address:#x} {count} {stride:#x}"))?;
        Ok(difference(&words))
    }

    /// Reads a word, which may meet a memory error.
    pub fn touch(&mut self, address: u64) -> Result<Touched, Failure> {
        let words = self.ask(&format!("touch {address:#x}"))?;
        if words.first().is_some_and(|word| word == "value") {
            return Ok(Touched::Value);
        }
        Ok(Touched::MachineCheck(MachineCheck {
            global: number(words.get(1))?,
            bank: number(words.get(2))?,
            status: number(words.get(3))?,
            address: number(words.get(4))?,
        }))
    }

    /// Asks the machine to suspend to RAM. The answer comes when the guest goes on: `end_sleep`.
    pub fn begin_sleep(&mut self) -> Result<Begun, Failure> {
        self.begin("sleep")
    }

    /// Whether the guest was asleep and woke up with its memory; else the machine did not fall asleep.
    pub fn end_sleep(&mut self, begun: Begun) -> Result<bool, Failure> {
        let words = self.end(begun)?;
        Ok(words.first().is_some_and(|word| word == "woken"))
    }

    /// The CD-ROM begins to read its first bytes into memory.
    pub fn begin_cd_read(&mut self, address: u64, bytes: u64) -> Result<(), Failure> {
        self.ask(&format!("cd-read {address:#x} {bytes:#x}"))
            .map(|_| ())
    }

    /// Whether what the CD-ROM was told to read has arrived.
    pub fn cd_ends_within(&mut self, patience: Duration) -> Result<bool, Failure> {
        let words = self.ask(&format!("cd-wait {}", patience.as_millis()))?;
        Ok(words.first().is_some_and(|word| word == "done"))
    }

    /// Calls code that somebody has put there; what it returned.
    pub fn call(&mut self, address: u64, argument: u64) -> Result<u64, Failure> {
        let words = self.ask(&format!("call {address:#x} {argument}"))?;
        number(words.first())
    }

    /// edu: guest memory into the device's buffer.
    pub fn edu_load(&mut self, address: u64) -> Result<(), Failure> {
        self.edu_load_by(0, address)
    }

    /// edu: the device's buffer into guest memory.
    pub fn edu_store(&mut self, address: u64) -> Result<(), Failure> {
        self.edu_store_by(0, address)
    }

    /// As `edu_load`, by the device that has `index` others before it.
    pub fn edu_load_by(&mut self, index: u64, address: u64) -> Result<(), Failure> {
        self.ask(&format!("edu-load {address:#x} 4096 {index}"))
            .map(|_| ())
    }

    /// As `edu_store`, by the device that has `index` others before it.
    pub fn edu_store_by(&mut self, index: u64, address: u64) -> Result<(), Failure> {
        self.ask(&format!("edu-store {address:#x} 4096 {index}"))
            .map(|_| ())
    }

    /// Begins to turn ranges private and back, in turn at `places` that are `stride` apart.
    pub fn begin_flip(
        &mut self,
        count: u64,
        address: u64,
        bytes: u64,
        stride: u64,
        places: u64,
    ) -> Result<Begun, Failure> {
        self.begin(&format!(
            "flip {count} {address:#x} {:#x} {stride:#x} {places}",
            bytes / 4096
        ))
    }

    /// How often each result came in what `begin_flip` began.
    pub fn end_flip(&mut self, begun: Begun) -> Result<Vec<(i64, u64)>, Failure> {
        let words = self.end(begun)?;
        results(words.get(1..).unwrap_or_default())
    }

    /// The even pages from `first` on go private and back one after the other, while the device that has `index` others
    /// before it writes odd pages between them, `trials` times.
    pub fn flip_beside_dma(
        &mut self,
        trials: u64,
        first: u64,
        places: u64,
        origin: u64,
        index: u64,
    ) -> Result<BesideDma, Failure> {
        let words = self.ask(&format!(
            "flip-beside-dma {trials} {first:#x} {places} {origin:#x} 77 {index}"
        ))?;
        Ok(BesideDma {
            lost: number(words.get(1))?,
            wrong_words: number(words.get(2))?,
            results: results(words.get(3..).unwrap_or_default())?,
        })
    }

    /// The second processor turns a page private and back `count` times, while the first reads it; how often that read it.
    pub fn flip_beside_reads(&mut self, count: u64, address: u64) -> Result<u64, Failure> {
        let words = self.ask(&format!("flip-beside-reads {count} {address:#x}"))?;
        match number(words.get(1))? {
            0 => number(words.first()),
            refused => Err(Failure::new(format!(
                "{refused} of {} conversions were refused",
                2 * count
            ))),
        }
    }

    pub fn power_off(&mut self) -> Result<(), Failure> {
        self.ask("off").map(|_| ())
    }
}

fn attributes(private: bool) -> u64 {
    match private {
        true => protocol::MAP_GPA_ENCRYPTED,
        false => 0,
    }
}

fn difference(words: &[String]) -> Option<String> {
    match words {
        [word] if word == "same" => None,
        _ => Some(words.join(" ")),
    }
}

/// A number in an answer.
pub fn number(word: Option<&String>) -> Result<u64, Failure> {
    let word = word.attempt(|| "the guest's answer is too short".into())?;
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => word.parse(),
    }
    .attempt(|| format!("the guest's answer has no number where one belongs: {word}"))
}

/// How often each result of conversions came.
pub fn results(words: &[String]) -> Result<Vec<(i64, u64)>, Failure> {
    words
        .iter()
        .map(|word| {
            let (value, times) = word
                .split_once('=')
                .attempt(|| format!("not VALUE=COUNT: {word}"))?;
            let value = number(Some(&value.to_string()))? as i64;
            Ok((value, number(Some(&times.to_string()))?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{difference, protocol::pattern, results};

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(String::from).collect()
    }

    #[test]
    fn results_are_signed() {
        let seen = results(&words("0x16=90 0xffffffffffffffea=10")).unwrap();
        assert_eq!(seen, [(22, 90), (-22, 10)]);
        assert!(results(&words("22")).is_err());
    }

    #[test]
    fn only_same_means_same() {
        assert_eq!(difference(&words("same")), None);
        assert!(difference(&words("differs 0x1000 0x0 512")).is_some());
        assert!(difference(&[]).is_some());
    }

    #[test]
    fn patterns_differ_between_seeds_and_addresses() {
        assert_ne!(pattern(1, 0x1000), pattern(2, 0x1000));
        assert_ne!(pattern(1, 0x1000), pattern(1, 0x1008));
        assert_ne!(pattern(1, 0x1000), 0);
    }
}
