// SPDX-License-Identifier: MIT OR Apache-2.0
//! An `edu` device that this host keeps for itself, by VFIO: its IOAS shows what we like of QEMU's memory, by address.

use crate::failure::{Attempt, Failure};
use crate::host::iommufd::Iommufd;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

/// linux/vfio.h.
const VFIO_DEVICE_GET_REGION_INFO: libc::c_ulong = 0x3b6c;
const VFIO_DEVICE_BIND_IOMMUFD: libc::c_ulong = 0x3b76;
const VFIO_DEVICE_ATTACH_IOMMUFD_PT: libc::c_ulong = 0x3b77;
const BAR0: u32 = 0;
const CONFIGURATION: u32 = 7;
/// The command register: decode memory, be a bus master.
const COMMAND: u64 = 4;
const COMMAND_MEMORY_MASTER: u16 = 6;
/// The device's registers, and its buffer in its own address space (see the payload).
const DMA_SOURCE: u64 = 0x80;
const DMA_TARGET: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
const RUN: u32 = 1;
const TO_MEMORY: u32 = 2;
const BUFFER: u32 = 0x40000;
const BYTES: u32 = 4096;
const PATIENCE: Duration = Duration::from_secs(60);

/// struct vfio_device_bind_iommufd.
#[repr(C)]
struct Bind {
    argsz: u32,
    flags: u32,
    iommufd: i32,
    out_devid: u32,
}

/// struct vfio_device_attach_iommufd_pt, as far as it is needed.
#[repr(C)]
struct Attach {
    argsz: u32,
    flags: u32,
    pt_id: u32,
}

/// struct vfio_region_info.
#[repr(C)]
struct Region {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

/// The device, with an IOAS that has nothing in it at first.
pub struct OwnEngine {
    device: File,
    registers: u64,
    pub iommufd: Iommufd,
    pub ioas: u32,
}

impl OwnEngine {
    /// The device with this PCI address, which vfio-pci has.
    pub fn open(address: &str) -> Result<Self, Failure> {
        let directory = format!("/sys/bus/pci/devices/{address}/vfio-dev");
        let name = fs::read_dir(&directory)
            .attempt(|| format!("reading {directory}"))?
            .find_map(|entry| entry.ok()?.file_name().into_string().ok())
            .attempt(|| format!("{directory} is empty"))?;
        let path = format!("/dev/vfio/devices/{name}");
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .attempt(|| format!("opening {path}"))?;
        let iommufd = Iommufd::open()?;
        let mut bind = Bind {
            argsz: size_of::<Bind>() as u32,
            flags: 0,
            iommufd: iommufd.descriptor(),
            out_devid: 0,
        };
        call(&device, VFIO_DEVICE_BIND_IOMMUFD, &mut bind)
            .attempt(|| format!("binding {path} to an iommufd"))?;
        let ioas = iommufd.allocate().attempt(|| "making an IOAS".into())?;
        let mut attach = Attach {
            argsz: size_of::<Attach>() as u32,
            flags: 0,
            pt_id: ioas,
        };
        call(&device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut attach)
            .attempt(|| format!("attaching {path} to an IOAS"))?;
        let configuration = region(&device, CONFIGURATION)?;
        device
            .write_all_at(
                &COMMAND_MEMORY_MASTER.to_le_bytes(),
                configuration + COMMAND,
            )
            .attempt(|| format!("switching {address} on"))?;
        let registers = region(&device, BAR0)?;
        Ok(Self {
            device,
            registers,
            iommufd,
            ioas,
        })
    }

    /// Copies the page at `iova` into the device's buffer.
    pub fn load(&self, iova: u64) -> Result<(), Failure> {
        self.run(iova as u32, BUFFER, RUN)
    }

    /// Copies the device's buffer into the page at `iova`.
    pub fn store(&self, iova: u64) -> Result<(), Failure> {
        self.run(BUFFER, iova as u32, RUN | TO_MEMORY)
    }

    fn run(&self, source: u32, target: u32, command: u32) -> Result<(), Failure> {
        for (register, value) in [
            (DMA_SOURCE, source),
            (DMA_TARGET, target),
            (DMA_COUNT, BYTES),
            (DMA_COMMAND, command),
        ] {
            self.device
                .write_all_at(&value.to_le_bytes(), self.registers + register)
                .attempt(|| "writing a register of the edu device".into())?;
        }
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let mut value = [0; 4];
            self.device
                .read_exact_at(&mut value, self.registers + DMA_COMMAND)
                .attempt(|| "reading a register of the edu device".into())?;
            if u32::from_le_bytes(value) & RUN == 0 {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Err(Failure::new("this host's edu device did not finish"))
    }
}

fn call<T>(device: &File, command: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each structure is what its ioctl reads and writes, says its size, and outlives the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), command, std::ptr::from_mut(argument)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where a region of the device begins in its file.
fn region(device: &File, index: u32) -> Result<u64, Failure> {
    let mut region = Region {
        argsz: size_of::<Region>() as u32,
        flags: 0,
        index,
        cap_offset: 0,
        size: 0,
        offset: 0,
    };
    call(device, VFIO_DEVICE_GET_REGION_INFO, &mut region)
        .attempt(|| format!("asking where region {index} is"))?;
    Ok(region.offset)
}
