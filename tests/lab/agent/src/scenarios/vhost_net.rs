// SPDX-License-Identifier: MIT OR Apache-2.0
//! A network device whose queues the host's kernel serves (vhost-net), which reaches guest memory through QEMU's addresses. It
//! comes to a running guest, carries datagrams both ways, and goes again; a guest that takes a buffer or the queues away harms
//! nobody, and the private bytes stay the guest's.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::{Attempt, Failure};
use crate::host::files::refused_for_good;
use crate::ledger::PAGE;
use crate::machine::Machine;
use crate::monitor::protocol::pattern;
use crate::monitor::Monitor;
use crate::place;
use crate::plugging::Port;
use crate::qmp::Qmp;
use crate::scenario::{Outcome, Scenario};
use crate::virtio::{Buffer, Device, NET, RINGS_BYTES};
use serde_json::json;
use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
const RECEIVE: Device = device(0, 16 * MIB);
const SEND: Device = device(1, 17 * MIB);
/// The headers of a datagram, and behind them what is in it.
const SENT: u64 = 20 * MIB;
const RECEIVED: u64 = 24 * MIB;
const BYTES: u64 = 1024;
const PATIENCE: Duration = Duration::from_secs(60);
const SILENCE: Duration = Duration::from_secs(1);
const PORT: &str = "pcie-root-port,id=port0,chassis=1";
const TAP: &str = "tap0";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 2);
const EVERYBODY: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 255);
/// What is before a datagram's content: virtio's own header, then those of Ethernet, IP and UDP.
const VIRTIO_BYTES: usize = 12;
const HEADER_BYTES: u64 = VIRTIO_BYTES as u64 + 14 + 20 + 8;
const SECRET: u64 = 999;
/// Of a queue that can't be read, for each of which QEMU might have something to say.
const KICKS: usize = 60;

const fn device(queue: u64, rings: u64) -> Device {
    Device {
        kind: NET,
        index: 0,
        queue,
        rings,
    }
}

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    scenario.prefix("ordinary: ");
    ordinary(scenario)?;
    scenario.prefix("confidential: ");
    confidential(scenario)?;
    scenario.prefix("");
    Ok(())
}

/// The device in a running guest, and the host's end of it.
struct Net {
    socket: UdpSocket,
    port: u16,
    seed: u64,
}

impl Net {
    fn plug(qmp: &mut Qmp) -> Result<Self, Failure> {
        let net = json!({
            "type": "tap", "id": "net0", "ifname": TAP, "script": "no", "downscript": "no", "vhost": true,
        });
        qmp.execute("netdev_add", net)?;
        let status = Command::new("/bin/busybox")
            .args([
                "ifconfig",
                TAP,
                &HOST.to_string(),
                "netmask",
                "255.255.255.0",
                "up",
            ])
            .status()
            .attempt(|| "starting ifconfig".into())?;
        if !status.success() {
            return Err(Failure::new(format!("ifconfig {TAP} ended with {status}")));
        }
        let device = json!({
            "driver": "virtio-net-pci", "id": "late0", "netdev": "net0", "bus": "port0", "romfile": "",
        });
        qmp.execute("device_add", device)?;
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
            .and_then(|socket| {
                socket.set_broadcast(true)?;
                socket.set_read_timeout(Some(PATIENCE))?;
                Ok(socket)
            })
            .attempt(|| "making a socket".into())?;
        let address = socket.local_addr().attempt(|| "asking a socket".into())?;
        Ok(Self {
            socket,
            port: address.port(),
            seed: 0,
        })
    }

    /// The device begins, with empty queues.
    fn start(monitor: &mut Monitor) -> Outcome {
        RECEIVE.start_with(monitor, 0, &[SEND]).map(|_| ())
    }

    /// A datagram gets from the guest to the host, and one from the host to the guest.
    fn works(&mut self, scenario: &Scenario, monitor: &mut Monitor, when: &str) -> Outcome {
        self.sends(scenario, monitor, when)?;
        self.seed += 1;
        let offered = Self::offer_room(monitor)?;
        self.receives(scenario, monitor, offered, when)?;
        scenario.progress(format!("{when}: datagrams arrive both ways"));
        Ok(())
    }

    fn sends(&mut self, scenario: &Scenario, monitor: &mut Monitor, when: &str) -> Outcome {
        self.seed += 1;
        monitor.fill(SENT + PAGE, BYTES, self.seed)?;
        for (at, word) in (SENT..).step_by(8).zip(self.headers()) {
            monitor.write(at, word)?;
        }
        let buffers = [
            Buffer::read(SENT, HEADER_BYTES),
            Buffer::read(SENT + PAGE, BYTES),
        ];
        let offered = SEND.offer(monitor, &buffers)?;
        let sent = SEND.wait(monitor, offered, PATIENCE)?;
        scenario.check(sent, format!("{when}: a datagram is sent"))?;
        let mut seen = [0; 2 * BYTES as usize];
        let (bytes, from) = self
            .socket
            .recv_from(&mut seen)
            .attempt(|| format!("{when}: the guest's datagram"))?;
        scenario.check(
            from.ip() == GUEST && seen[..bytes] == content(self.seed, SENT + PAGE)[..],
            format!("{when}: the host has the guest's datagram ({bytes} bytes from {from})"),
        )
    }

    /// Room for a datagram that comes.
    fn offer_room(monitor: &mut Monitor) -> Result<u64, Failure> {
        monitor.zero(RECEIVED + PAGE, BYTES)?;
        let buffers = [
            Buffer::written(RECEIVED, HEADER_BYTES),
            Buffer::written(RECEIVED + PAGE, PAGE),
        ];
        RECEIVE.offer(monitor, &buffers)
    }

    fn send_to_guest(&self) -> Outcome {
        self.socket
            .send_to(&content(self.seed, RECEIVED + PAGE), (EVERYBODY, 7))
            .map(|_| ())
            .attempt(|| "sending to the guest".into())
    }

    /// The guest gets it, after what the host's network stack had to say to everybody, and what was sent before.
    fn receives(
        &self,
        scenario: &Scenario,
        monitor: &mut Monitor,
        mut offered: u64,
        when: &str,
    ) -> Outcome {
        const MOST_OTHERS: usize = 16;
        self.send_to_guest()?;
        for _ in 0..MOST_OTHERS {
            let answer = RECEIVE.answer(monitor, offered, PATIENCE)?;
            scenario.check(
                answer.written.is_some(),
                format!("{when}: the guest receives something: {answer:?}"),
            )?;
            if answer.written == Some(HEADER_BYTES + BYTES)
                && monitor.check(RECEIVED + PAGE, BYTES, self.seed)?.is_none()
            {
                return Ok(());
            }
            offered = Self::offer_room(monitor)?;
        }
        scenario.check(false, format!("{when}: the guest has the host's datagram"))
    }

    /// Of a datagram to everybody: the bytes before its content, by the word.
    fn headers(&self) -> Vec<u64> {
        let mut bytes = vec![0; VIRTIO_BYTES];
        bytes.extend([0xff; 6]);
        bytes.extend([0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x08, 0x00]);
        let ip = bytes.len();
        let length = |more: u64| ((more + BYTES) as u16).to_be_bytes();
        bytes.extend([0x45, 0]);
        bytes.extend(length(28));
        bytes.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        bytes.extend(GUEST.octets());
        bytes.extend(EVERYBODY.octets());
        let sum = checksum(&bytes[ip..]);
        bytes[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
        bytes.extend(7u16.to_be_bytes());
        bytes.extend(self.port.to_be_bytes());
        bytes.extend(length(8));
        // No checksum of its own.
        bytes.extend([0, 0]);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let words = bytes.chunks_exact(8).filter_map(|word| word.first_chunk());
        words.map(|word| u64::from_le_bytes(*word)).collect()
    }
}

fn content(seed: u64, origin: u64) -> Vec<u8> {
    let words = (origin..origin + BYTES).step_by(8);
    words
        .flat_map(|at| pattern(seed, at).to_le_bytes())
        .collect()
}

/// RFC 1071.
fn checksum(header: &[u8]) -> u16 {
    let words = header.chunks_exact(2);
    let sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

fn ordinary(scenario: &mut Scenario) -> Outcome {
    let object = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}");
    let (mut machine, serial) = Machine::start(
        &scenario.directory().join("ordinary"),
        &[
            "-kernel",
            place::payload(),
            "-object",
            &object,
            "-m",
            "64M",
            "-machine",
            "q35,accel=kvm,memory-backend=ram0,x-change-vmfd-on-reset=on",
            "-device",
            PORT,
        ],
    )?;
    let mut monitor = Monitor::new(serial)?;
    let mut net = Net::plug(&mut machine.qmp)?;
    Net::start(&mut monitor)?;
    net.works(scenario, &mut monitor, "at first")?;
    machine.qmp.execute("system_reset", json!({}))?;
    monitor.wait_until_ready()?;
    Net::start(&mut monitor)?;
    net.works(scenario, &mut monitor, "the VM rebuilt")?;
    monitor.power_off()?;
    machine.wait_for_exit(PATIENCE)
}

fn confidential(scenario: &mut Scenario) -> Outcome {
    let mut guest = Confidential::with_one_block(
        &scenario.directory().join("confidential"),
        RAM_BYTES,
        "",
        &["-machine", "x-change-vmfd-on-reset=on", "-device", PORT],
    )?;
    let mut net = Net::plug(&mut guest.machine.qmp)?;
    Net::start(&mut guest.monitor)?;
    net.works(scenario, &mut guest.monitor, "at first")?;
    room_goes(scenario, &mut guest, &mut net)?;
    queues_go(scenario, &mut guest, &mut net)?;
    let when = "queues that are private from the start";
    guest.convert(scenario, RECEIVE.rings, RINGS_BYTES, true)?;
    Net::start(&mut guest.monitor)?;
    lives(scenario, &mut guest, when)?;
    guest.convert(scenario, RECEIVE.rings, RINGS_BYTES, false)?;
    Net::start(&mut guest.monitor)?;
    net.works(scenario, &mut guest.monitor, when)?;
    guest.agree_but_kernel(scenario, when)?;

    guest.machine.qmp.execute("system_reset", json!({}))?;
    guest.monitor.wait_until_ready()?;
    guest.ledger.reset();
    guest.reopen()?;
    Net::start(&mut guest.monitor)?;
    net.works(scenario, &mut guest.monitor, "the VM rebuilt")?;

    let port = Port {
        bus: "port0",
        device: "late0",
    };
    port.unplug(&mut guest)?;
    // The same on either kind of kernel; `direct-map` has it in place.
    if !guest.in_place {
        vhost_devices_fail(scenario, &mut guest)?;
    }
    let qmp = &mut guest.machine.qmp;
    qmp.execute("netdev_del", json!({"id": "net0"}))?;
    guest.fill(RECEIVED, MIB, 7)?;
    guest.agree(scenario, "after unplugging")?;
    let said = guest.machine.complaints();
    scenario.fact("lines that QEMU said", said.lines().count());
    scenario.fact("the last of them", said.lines().last());
    guest.finish(scenario)
}

/// Devices of the kernel's vhost that can't be had, early or late: the host has no such back end, or another one in its place.
pub(super) fn vhost_devices_fail(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let devices = [
        (
            "/dev/vhost-scsi",
            json!({"driver": "vhost-scsi-pci", "wwpn": "naa.5001405324af0985", "bus": "port0"}),
        ),
        (
            "/dev/vhost-vsock",
            json!({"driver": "vhost-vsock-pci", "guest-cid": 3, "bus": "port0"}),
        ),
    ];
    for (node, device) in devices {
        let name = device["driver"].as_str().unwrap_or_default().to_string();
        let said = refused_for_good(scenario, &mut guest.machine, "device_add", &device)?;
        scenario.fact(&format!("{name} without {node}"), said);
        symlink("/dev/vhost-net", node).attempt(|| format!("making {node}"))?;
        let said = refused_for_good(scenario, &mut guest.machine, "device_add", &device);
        fs::remove_file(node).attempt(|| format!("removing {node}"))?;
        scenario.fact(&format!("{name} on another's node"), said?);
    }
    lives(scenario, guest, "devices failed")
}

fn lives(scenario: &Scenario, guest: &mut Confidential, when: &str) -> Outcome {
    let status = guest.machine.qmp.execute("query-status", json!({}))?;
    scenario.check_equal(
        status["status"].as_str(),
        Some("running"),
        format!("the VM's status, {when}"),
    )?;
    guest.monitor.ask("ping").map(|_| ())
}

/// The room for a datagram turns private before it comes.
fn room_goes(scenario: &mut Scenario, guest: &mut Confidential, net: &mut Net) -> Outcome {
    let when = "the room for a datagram private";
    Net::offer_room(&mut guest.monitor)?;
    guest.convert(scenario, RECEIVED, 2 * PAGE, true)?;
    guest.fill(RECEIVED, 2 * PAGE, SECRET)?;
    net.send_to_guest()?;
    lives(scenario, guest, when)?;
    net.sends(scenario, &mut guest.monitor, when)?;
    guest.agree_but_kernel(scenario, when)?;
    guest.convert(scenario, RECEIVED, 2 * PAGE, false)?;
    Net::start(&mut guest.monitor)?;
    net.works(scenario, &mut guest.monitor, when)?;
    guest.agree(scenario, when)
}

/// The queues turn private while the device runs.
fn queues_go(scenario: &mut Scenario, guest: &mut Confidential, net: &mut Net) -> Outcome {
    let when = "the queues private";
    Net::offer_room(&mut guest.monitor)?;
    for queue in [RECEIVE, SEND] {
        guest.convert(scenario, queue.rings, RINGS_BYTES, true)?;
    }
    net.send_to_guest()?;
    let lines = |guest: &Confidential| guest.machine.complaints().lines().count();
    let (began, before) = (Instant::now(), lines(guest));
    let buffer = [Buffer::read(SENT, HEADER_BYTES)];
    let mut offered = 0;
    for _ in 0..KICKS {
        offered = SEND.offer(&mut guest.monitor, &buffer)?;
    }
    let sent = SEND.wait(&mut guest.monitor, offered, SILENCE)?;
    scenario.check(!sent, format!("{when}: nothing is sent"))?;
    let said = lines(guest) - before;
    scenario.fact(&format!("lines of QEMU for {KICKS} kicks"), said);
    let most = 10 * (began.elapsed().as_secs() as usize / 5 + 2);
    scenario.check(
        said <= most,
        format!("{when}: {KICKS} kicks make {said} lines, {most} at most"),
    )?;
    lives(scenario, guest, when)?;
    for queue in [RECEIVE, SEND] {
        guest.convert(scenario, queue.rings, RINGS_BYTES, false)?;
    }
    Net::start(&mut guest.monitor)?;
    net.works(scenario, &mut guest.monitor, when)
}

#[cfg(test)]
mod tests {
    use super::checksum;

    #[test]
    fn a_headers_checksum_makes_its_sum_zero() {
        let mut header = [
            0x45, 0, 0x04, 0x1c, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 9, 2, 10, 9, 9, 255,
        ];
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum(&header), 0);
    }
}
