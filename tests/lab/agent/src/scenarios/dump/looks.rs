// SPDX-License-Identifier: MIT OR Apache-2.0
//! Everything else by which an administrator reads guest memory.

use super::*;
use crate::monitor::protocol::pattern;
use crate::qmp::Gmem;
use crate::secrets;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// One page of each kind, side by side.
const SHARED: u64 = MIDDLE - PAGE;
const PRIVATE: u64 = MIDDLE;
const GDB_PATIENCE: Duration = Duration::from_secs(60);

pub fn run(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let refused = Gmem::query(&mut guest.machine.qmp)?.sum("access-refused")?;
    guest.settle()?;
    let before = held(guest)?;
    files(scenario, guest)?;
    human(scenario, guest)?;
    debugger(scenario, guest)?;
    holds_the_same(scenario, guest, "reading through the monitor", &before)?;
    let now = Gmem::query(&mut guest.machine.qmp)?.sum("access-refused")?;
    scenario.fact("access-refused", now - refused);
    scenario.check(now > refused, "refused accesses are counted")?;
    guest.agree(scenario, "after all who read")
}

fn words(gpa: u64, bytes: u64) -> Vec<u8> {
    (gpa..gpa + bytes)
        .step_by(8)
        .flat_map(|at| pattern(SHARED_SEED, at).to_le_bytes())
        .collect()
}

/// pmemsave and memsave.
fn files(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let path = dump_file();
    let arguments = |gpa: u64, bytes: u64| json!({"val": gpa, "size": bytes, "filename": path.display().to_string()});
    let read = || fs::read(&path).attempt(|| format!("reading {}", path.display()));

    guest
        .machine
        .qmp
        .execute("pmemsave", arguments(SHARED, 2 * PAGE))?;
    let mut expected = words(SHARED, PAGE);
    expected.resize(2 * PAGE as usize, 0);
    scenario.check(
        read()? == expected,
        "pmemsave: the shared page as it is, zeros for the private one",
    )?;

    guest
        .machine
        .qmp
        .execute("memsave", arguments(SHARED, PAGE))?;
    scenario.check(
        read()? == words(SHARED, PAGE),
        "memsave: the shared page as it is",
    )?;
    let answer = guest
        .machine
        .qmp
        .try_execute("memsave", arguments(SHARED, 2 * PAGE))?;
    let sentence = answer.err().map(|refusal| refusal.description);
    scenario.check(sentence.is_some(), "memsave of a private page is refused")?;
    scenario.fact("memsave of a private page", sentence);
    scenario.check(
        read()? == words(SHARED, PAGE),
        "memsave leaves nothing of a private page in the file",
    )
}

fn human(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    for command in ["x", "xp"] {
        let text = guest
            .machine
            .qmp
            .human(&format!("{command} /2gx {SHARED:#x}"))?;
        for at in [SHARED, SHARED + 8] {
            let word = format!("{:#018x}", pattern(SHARED_SEED, at));
            scenario.check(
                text.contains(&word),
                format!("{command} of a shared page shows {word}: {text}"),
            )?;
        }
        let text = guest
            .machine
            .qmp
            .human(&format!("{command} /1024bx {PRIVATE:#x}"))?;
        scenario.check(
            text.contains("Cannot access memory") && !text.contains(": 0x"),
            format!("{command} of a private page shows none of it: {text}"),
        )?;
        scenario.fact(&format!("{command} of a private page"), text.trim());
        // What is between is shared, what comes then is not.
        let text = guest
            .machine
            .qmp
            .human(&format!("{command} /4gx {:#x}", PRIVATE - 16))?;
        scenario.check(
            text.contains("Cannot access memory"),
            format!("{command} ends where a private page begins: {text}"),
        )?;
    }

    let text = guest.machine.qmp.human(&format!("gpa2hpa {PRIVATE:#x}"))?;
    scenario.check(
        text.contains("private"),
        format!("gpa2hpa of a private page is refused: {text}"),
    )?;
    scenario.fact("gpa2hpa of a private page", text.trim());
    let text = guest.machine.qmp.human(&format!("gpa2hpa {SHARED:#x}"))?;
    scenario.check(
        text.contains("Host physical address"),
        format!("gpa2hpa of a shared page: {text}"),
    )?;
    let text = guest.machine.qmp.human(&format!("gva2gpa {PRIVATE:#x}"))?;
    scenario.check_equal(text.trim(), &format!("gpa: {PRIVATE:#x}"), "gva2gpa")?;

    // What they show is the guest's page tables, which are shared; at least they have to come back.
    let nothing = std::env::temp_dir().join("nothing");
    let path = nothing.display();
    for command in [
        format!("gpa2hva {PRIVATE:#x}"),
        format!("x /4i {PRIVATE:#x}"),
        format!("xp /4i {PRIVATE:#x}"),
        "info mem".into(),
        "info tlb".into(),
        "info registers -a".into(),
        "info ramblock".into(),
        "info mtree -f".into(),
        "info dump".into(),
        "info gmem".into(),
        "info cpus".into(),
        "info memdev".into(),
        "info memory_size_summary".into(),
        format!("sum {PRIVATE} {PAGE}"),
        format!("memsave {PRIVATE:#x} {PAGE} \"{path}\""),
        format!("pmemsave {PRIVATE:#x} {PAGE} \"{path}\""),
    ] {
        let text = guest.machine.qmp.human(&command)?;
        none_of_it(scenario, guest, &command, text.as_bytes())?;
    }
    let file = fs::read(&nothing).attempt(|| format!("reading {path}"))?;
    scenario.check(
        file.iter().all(|byte| *byte == 0),
        "pmemsave of a private page has zeros",
    )
}

fn none_of_it(scenario: &Scenario, guest: &Confidential, what: &str, text: &[u8]) -> Outcome {
    let word = format!("{:x}", pattern(SECRET_SEED, PRIVATE));
    let found = secrets::find(text, &guest.ledger, SEEDS).is_some()
        || String::from_utf8_lossy(text).contains(&word);
    scenario.check(!found, format!("`{what}` shows nothing private"))
}

/// A debugger, by virtual and by physical addresses.
fn debugger(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let socket = std::env::temp_dir().join("gdb");
    let text = guest.machine.qmp.human(&format!(
        "gdbserver unix:{},server=on,wait=off",
        socket.display()
    ))?;
    let stream = UnixStream::connect(&socket)
        .attempt(|| format!("connecting to {}: {text}", socket.display()))?;
    let mut gdb = Gdb(stream);
    let result = debug(scenario, &mut gdb);
    // It stops the guest when somebody comes; it goes on when they go.
    gdb.ask("D")?;
    drop(gdb);
    guest.machine.qmp.human("gdbserver none")?;
    result?;
    scenario.check_equal(
        status(guest)?,
        "running".into(),
        "status after the debugger",
    )
}

fn debug(scenario: &mut Scenario, gdb: &mut Gdb) -> Outcome {
    for mode in [0, 1] {
        let answer = gdb.ask(&format!("Qqemu.PhyMemMode:{mode}"))?;
        scenario.check_equal(answer.as_str(), "OK", "PhyMemMode")?;
        let shared: String = pattern(SHARED_SEED, SHARED)
            .to_le_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let answer = gdb.ask(&format!("m{SHARED:x},8"))?;
        scenario.check_equal(answer, shared, "a debugger reads a shared page")?;
        for request in [
            format!("m{PRIVATE:x},8"),
            format!("m{:x},10", PRIVATE - 8),
            format!("M{PRIVATE:x},8:0102030405060708"),
            format!("Z0,{PRIVATE:x},1"),
        ] {
            let answer = gdb.ask(&request)?;
            scenario.check(
                answer.starts_with('E'),
                format!("a debugger gets an error for `{request}`: {answer}"),
            )?;
            scenario.fact("a debugger at a private page", answer);
        }
    }
    gdb.ask("Qqemu.PhyMemMode:0").map(|_| ())
}

/// The remote protocol of gdb: one packet there, one back.
struct Gdb(UnixStream);

impl Gdb {
    fn ask(&mut self, request: &str) -> Result<String, Failure> {
        let sum = request.bytes().fold(0u8, u8::wrapping_add);
        let stream = &mut self.0;
        stream
            .set_read_timeout(Some(GDB_PATIENCE))
            .attempt(|| "setting a time".into())?;
        write!(stream, "${request}#{sum:02x}").attempt(|| format!("asking `{request}`"))?;
        let mut answer = Vec::new();
        let mut byte = [0];
        // An acknowledgement comes first; the packet ends with # and two digits.
        while answer.iter().rev().nth(2) != Some(&b'#') {
            stream
                .read_exact(&mut byte)
                .attempt(|| format!("waiting for the answer to `{request}`"))?;
            match byte[0] {
                b'$' => answer.clear(),
                other => answer.push(other),
            }
        }
        stream.write_all(b"+").attempt(|| "acknowledging".into())?;
        answer.truncate(answer.len() - 3);
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}
