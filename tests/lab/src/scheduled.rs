// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this machine's scheduler gave to a process: tells an L1 that stands still from one that is not let run.

use std::fs;
use std::path::Path;
use std::time::Duration;

/// Less than this part of a time, and a process did nothing in it. An idle L1 takes a hundredth.
const NOTHING: f64 = 0.05;

/// Of all threads of a process together, since each began. From /proc/PID/task/TID/schedstat
/// (Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat").
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scheduled {
    /// On a processor.
    pub ran: Duration,
    /// Ready to run, and waiting for one.
    pub waited: Duration,
}

impl Scheduled {
    /// Nothing for a process that is gone, and on a kernel that does not count.
    pub fn of(pid: u32) -> Scheduled {
        Scheduled::under(&Path::new("/proc").join(pid.to_string()))
    }

    fn under(process: &Path) -> Scheduled {
        let Ok(tasks) = fs::read_dir(process.join("task")) else {
            return Scheduled::default();
        };
        tasks
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("schedstat")).ok())
            .filter_map(|text| parse(&text))
            .fold(Scheduled::default(), |sum, one| Scheduled {
                ran: sum.ran + one.ran,
                waited: sum.waited + one.waited,
            })
    }

    /// Threads that ended in between take their time with them.
    pub fn since(self, before: Scheduled) -> Scheduled {
        Scheduled {
            ran: self.ran.saturating_sub(before.ran),
            waited: self.waited.saturating_sub(before.waited),
        }
    }

    /// Whether who took this did nothing in `time`, though nobody kept it from that.
    pub fn stood_still(self, time: Duration) -> bool {
        self.ran + self.waited < time.mul_f64(NOTHING)
    }

    /// What to think of an L1 that said nothing for `time`.
    pub fn in_words(self, time: Duration) -> String {
        let (ran, waited) = (self.ran.as_secs(), self.waited.as_secs());
        let meaning = if self.stood_still(time) {
            "it stands still"
        } else if self.waited > self.ran {
            "this machine has too much else to do"
        } else {
            "it is busy"
        };
        format!(
            "in {} s L1's emulator ran for {ran} s and waited {waited} s for a processor: {meaning}",
            time.as_secs()
        )
    }
}

/// `time on a processor, time ready, times scheduled`, in nanoseconds.
fn parse(text: &str) -> Option<Scheduled> {
    let mut numbers = text.split_whitespace().map(|word| word.parse().ok());
    let (ran, waited) = (numbers.next()??, numbers.next()??);
    Some(Scheduled {
        ran: Duration::from_nanos(ran),
        waited: Duration::from_nanos(waited),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(ran: u64, waited: u64) -> Scheduled {
        Scheduled {
            ran: Duration::from_secs(ran),
            waited: Duration::from_secs(waited),
        }
    }

    #[test]
    fn the_kernels_line_is_read() {
        assert_eq!(
            parse("2000000000 1000000000 42\n"),
            Some(seconds(2, 1)),
            "nanoseconds"
        );
        assert_eq!(parse("2000000000"), None);
        assert_eq!(parse("some text 3"), None);
    }

    #[test]
    fn this_process_has_run() {
        let before = Scheduled::of(std::process::id());
        let mut sum = 0_u64;
        while Scheduled::of(std::process::id()).since(before).ran < Duration::from_millis(2) {
            sum = sum.wrapping_add(std::hint::black_box(1));
        }
        assert!(sum > 0);
        assert_eq!(Scheduled::of(u32::MAX), Scheduled::default());
    }

    #[test]
    fn silence_has_three_meanings() {
        let time = Duration::from_secs(100);
        assert!(seconds(1, 1).in_words(time).ends_with("it stands still"));
        assert!(seconds(30, 90).in_words(time).ends_with("else to do"));
        assert!(seconds(150, 20).in_words(time).ends_with("it is busy"));
        assert!(!seconds(0, 90).stood_still(time), "it was not let run");
    }
}
