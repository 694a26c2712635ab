// SPDX-License-Identifier: MIT OR Apache-2.0
//! What somebody asked for.

use std::path::PathBuf;

pub const USAGE: &str = "\
gmem-host [OPTION…]: runs guests on memory-backend-gmem on this machine, as root, and writes a report to send.

  --list             say what this host has and what would run, run nothing, write nothing
  --only A,B         only these scenarios
  --device PCI       hand this device to guests, as 0000:01:00.0; may be given several times. Asked about first, given back
                     to its driver at the end. Without it no device is touched
  --firmware FILE    boot an SNP or TDX guest with this firmware (OVMF.fd): what the host has of the two
  --kind snp|tdx     which one, where that is not clear
  --image DISK       the disk of that guest, raw or qcow2; what the guest writes to it is thrown away
  --until TEXT       what that guest prints on its first serial port when it is up (default: login:)
  --report PATH      write PATH.json and PATH.txt (default: gmem-host-report in the current folder)
  --work DIR         where sockets and logs go meanwhile (default: a new folder in $TMPDIR or /tmp)
  --cpu MODEL        QEMU's -cpu (default: host)
  --patience N       wait N times as long for guests
  --yes              don't ask before a device is taken

Exit status: 0 all that ran passed, 1 something failed, 2 nothing could be run, 130 interrupted.
";

/// What was asked for.
#[derive(Debug, PartialEq)]
pub struct Options {
    pub list: bool,
    pub only: Option<Vec<String>>,
    pub devices: Vec<String>,
    pub firmware: Option<PathBuf>,
    pub kind: Option<String>,
    pub image: Option<PathBuf>,
    pub until: String,
    pub report: PathBuf,
    pub work: Option<PathBuf>,
    pub cpu: String,
    pub patience: f64,
    pub yes: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            list: false,
            only: None,
            devices: Vec::new(),
            firmware: None,
            kind: None,
            image: None,
            until: "login:".into(),
            report: "gmem-host-report".into(),
            work: None,
            cpu: "host".into(),
            patience: 1.0,
            yes: false,
        }
    }
}

/// Reads the words after the program's name. `None`: help was asked for.
pub fn read(words: impl IntoIterator<Item = String>) -> Result<Option<Options>, String> {
    let mut options = Options::default();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let (name, inline) = match word.split_once('=') {
            Some((name, value)) => (name.to_string(), Some(value.to_string())),
            None => (word, None),
        };
        let flag = match name.as_str() {
            "--help" | "-h" => return Ok(None),
            "--list" => Some(&mut options.list),
            "--yes" => Some(&mut options.yes),
            _ => None,
        };
        if let Some(flag) = flag {
            if inline.is_some() {
                return Err(format!("{name} takes no value"));
            }
            *flag = true;
            continue;
        }
        let mut value = || {
            inline
                .clone()
                .or_else(|| words.next())
                .filter(|value| !value.is_empty())
                .ok_or_else(|| format!("{name} needs a value; --help says which"))
        };
        match name.as_str() {
            "--only" => {
                options.only = Some(value()?.split(',').map(String::from).collect());
            }
            "--device" => options.devices.push(address(&value()?)?),
            "--firmware" => options.firmware = Some(value()?.into()),
            "--image" => options.image = Some(value()?.into()),
            "--until" => options.until = value()?,
            "--report" => options.report = value()?.into(),
            "--work" => options.work = Some(value()?.into()),
            "--cpu" => options.cpu = value()?,
            "--kind" => {
                let kind = value()?;
                if !["snp", "tdx"].contains(&kind.as_str()) {
                    return Err(format!("--kind is snp or tdx, and not {kind}"));
                }
                options.kind = Some(kind);
            }
            "--patience" => {
                let text = value()?;
                let number = text.parse::<f64>().ok();
                options.patience = number
                    .filter(|number| (0.1..=1000.0).contains(number))
                    .ok_or_else(|| {
                        format!("--patience is a number from 0.1 to 1000, and not {text}")
                    })?;
            }
            _ => {
                return Err(format!(
                    "there is no option {name}; --help says which there are"
                ))
            }
        }
    }
    let devices = &options.devices;
    if let Some(twice) = (1..devices.len()).find(|&at| devices[..at].contains(&devices[at])) {
        return Err(format!("--device {} is given twice", devices[twice]));
    }
    if options.firmware.is_none() && (options.image.is_some() || options.kind.is_some()) {
        return Err(
            "--image and --kind are about the guest that --firmware boots: give it, too".into(),
        );
    }
    Ok(Some(options))
}

/// A PCI address as sysfs writes it: domain, bus, device, function. The domain may be left out.
fn address(text: &str) -> Result<String, String> {
    let wrong = || {
        format!("{text} is no PCI address; one looks like 0000:01:00.0, and `lspci -D` lists them")
    };
    let full = match text.matches(':').count() {
        1 => format!("0000:{text}"),
        _ => text.to_string(),
    }
    .to_ascii_lowercase();
    let is_hex = |part: &str, digits: usize| {
        part.len() == digits && part.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let parts: Vec<&str> = full.split([':', '.']).collect();
    match parts.as_slice() {
        [domain, bus, device, function]
            if [(4, b':'), (7, b':'), (10, b'.')]
                .iter()
                .all(|&(at, sign)| full.as_bytes().get(at) == Some(&sign))
                && is_hex(domain, 4)
                && is_hex(bus, 2)
                && is_hex(device, 2)
                && is_hex(function, 1) =>
        {
            Ok(full)
        }
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::{read, Options};

    fn of(line: &str) -> Result<Option<Options>, String> {
        read(line.split_whitespace().map(String::from))
    }

    #[test]
    fn what_is_asked_for_is_read() {
        assert_eq!(of("").unwrap(), Some(Options::default()));
        assert_eq!(of("--yes --help").unwrap(), None);
        let read = of("--device 01:00.0 --device=0001:AB:1f.7 --only a,b --firmware f --kind tdx --patience 2.5 --until=a=b");
        let read = read.unwrap().unwrap();
        assert_eq!(read.devices, ["0000:01:00.0", "0001:ab:1f.7"]);
        assert_eq!(read.only, Some(vec!["a".to_string(), "b".to_string()]));
        assert_eq!(read.kind.as_deref(), Some("tdx"));
        assert_eq!((read.patience, read.until.as_str()), (2.5, "a=b"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (line, word) in [
            ("--devise 0000:01:00.0", "--devise"),
            ("--device", "--device"),
            ("--device=", "--device"),
            ("--device eth0", "eth0"),
            ("--device 0000:01:00", "0000:01:00"),
            ("--device 0000:01.00:0", "0000:01.00:0"),
            ("--device ../../../etc", "PCI address"),
            ("--device 01:00.0 --device 0000:01:00.0", "twice"),
            ("--patience 0", "0.1"),
            ("--patience nan", "nan"),
            ("--kind sev", "sev"),
            ("--image x", "--firmware"),
            ("--yes=no", "--yes"),
            ("run", "run"),
        ] {
            let refusal = of(line).unwrap_err();
            assert!(refusal.contains(word), "{line}: {refusal}");
        }
    }
}
