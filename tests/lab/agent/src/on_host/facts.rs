// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a host has: asked or tried, never assumed from a version. Nothing here says whose host it is.

use gmem::{Attribute, Block, BlockConfig, Vm};
use serde_json::{json, Value};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// linux/kvm.h.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_CHECK_EXTENSION: libc::c_ulong = 0xae03;
const KVM_CAP_VM_TYPES: libc::c_ulong = 235;
const CAPABILITIES: &[(&str, libc::c_ulong)] = &[
    ("exit_hypercall", 201),
    ("user_memory2", 231),
    ("memory_fault_info", 232),
    ("memory_attributes", 233),
    ("guest_memfd", 234),
    ("vm_types", KVM_CAP_VM_TYPES),
    ("guest_memfd_flags", 244),
];
pub const VM_TYPES: [&str; 6] = ["default", "sw-protected", "sev", "sev-es", "snp", "tdx"];
const SW_PROTECTED: usize = 1;
const SNP: usize = 4;
const TDX: usize = 5;
const TRIAL_BYTES: u64 = 2 << 20;

/// Of SEV-SNP, by CPUID: where the C-bit is, and how many address bits encryption costs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snp {
    pub c_bit: u64,
    pub reduced_bits: u64,
    pub has_device: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tdx {
    /// `kvm_intel.tdx`.
    pub switched_on: bool,
}

pub struct Facts {
    pub kernel: String,
    pub processor: String,
    pub flags: Vec<&'static str>,
    pub processors: usize,
    pub memory_bytes: u64,
    pub nodes: usize,
    pub capabilities: Vec<(&'static str, i32)>,
    pub vm_types: Vec<&'static str>,
    /// How memory of such a VM is backed, or why there can be none.
    pub ordinary: Result<String, String>,
    pub sw_protected: Result<String, String>,
    /// What the library found for each of both.
    pub probes: Vec<(&'static str, String)>,
    pub snp: Option<Snp>,
    pub tdx: Option<Tdx>,
    /// Module parameters that decide what KVM offers.
    pub parameters: Vec<(String, String)>,
    pub iommufd: bool,
    pub vfio_pci: bool,
    pub vfio_cdev: bool,
    pub iommus: Vec<String>,
    /// Sizes in bytes, pages, of which free.
    pub huge_pages: Vec<(u64, u64, u64)>,
    pub debugfs: bool,
    pub tracefs: bool,
    pub lockdown: String,
}

impl Facts {
    /// Of a host that has nothing.
    pub fn nothing() -> Self {
        Self {
            kernel: String::new(),
            processor: String::new(),
            flags: Vec::new(),
            processors: 0,
            memory_bytes: 0,
            nodes: 0,
            capabilities: Vec::new(),
            vm_types: Vec::new(),
            ordinary: Err("no KVM".into()),
            sw_protected: Err("no KVM".into()),
            probes: Vec::new(),
            snp: None,
            tdx: None,
            parameters: Vec::new(),
            iommufd: false,
            vfio_pci: false,
            vfio_cdev: false,
            iommus: Vec::new(),
            huge_pages: Vec::new(),
            debugfs: false,
            tracefs: false,
            lockdown: String::new(),
        }
    }

    /// Whether confidential VMs convert in place.
    pub fn in_place(&self) -> bool {
        self.sw_protected
            .as_ref()
            .is_ok_and(|backing| backing == "in-place")
    }

    /// KVM says that ordinary VMs can be on a guest_memfd, and the library says that they can't.
    pub fn library_refuses(&self) -> bool {
        const MMAP_INIT_SHARED: i32 = 3;
        let of = |name: &str| {
            let found = self.capabilities.iter().find(|row| row.0 == name);
            found.map_or(0, |row| row.1)
        };
        self.ordinary.is_err()
            && of("user_memory2") > 0
            && of("guest_memfd") > 0
            && of("guest_memfd_flags") & MMAP_INIT_SHARED == MMAP_INIT_SHARED
    }

    /// Looks at this machine. An error says what to do about it.
    pub fn find() -> Result<Self, String> {
        let mut facts = Self::nothing();
        facts.find_machine();
        facts.find_kvm()?;
        facts.find_devices();
        Ok(facts)
    }

    fn find_machine(&mut self) {
        self.kernel = line("/proc/sys/kernel/osrelease");
        let text = text("/proc/cpuinfo");
        self.processor = processor(&text);
        self.flags = flags(&text);
        self.processors = std::thread::available_parallelism().map_or(0, |count| count.get());
        self.memory_bytes = memory(&self::text("/proc/meminfo"), "MemTotal:");
        self.nodes = names("/sys/devices/system/node")
            .iter()
            .filter(|name| {
                let number = name.strip_prefix("node").unwrap_or("x");
                number.bytes().all(|byte| byte.is_ascii_digit())
            })
            .count();
        self.huge_pages = pools();
        self.lockdown = chosen(&line("/sys/kernel/security/lockdown"));
    }

    fn find_kvm(&mut self) -> Result<(), String> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let kvm = kvm.map_err(|error| no_kvm(&error, &self.flags))?;
        // SAFETY: both take numbers only and touch no memory.
        let ask = |command, argument: libc::c_ulong| unsafe {
            libc::ioctl(kvm.as_raw_fd(), command, argument)
        };
        if ask(KVM_GET_API_VERSION, 0) != 12 {
            return Err(
                "/dev/kvm is not KVM's device: it does not answer KVM_GET_API_VERSION".into(),
            );
        }
        for (name, number) in CAPABILITIES {
            self.capabilities
                .push((name, ask(KVM_CHECK_EXTENSION, *number)));
        }
        let types = ask(KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES).max(1);
        let offered = |kind: usize| types & (1 << kind) != 0;
        self.vm_types = (0..VM_TYPES.len())
            .filter(|&kind| offered(kind))
            .map(|kind| VM_TYPES[kind])
            .collect();
        self.ordinary = self.try_vm(&kvm, 0, &BlockConfig::new("trial", TRIAL_BYTES));
        let config = BlockConfig::confidential("trial", TRIAL_BYTES, Attribute::Shared);
        self.sw_protected = match offered(SW_PROTECTED) {
            true => self.try_vm(&kvm, SW_PROTECTED, &config),
            false => Err("KVM offers no VMs of the type KVM_X86_SW_PROTECTED_VM (CONFIG_KVM_SW_PROTECTED_VM)".into()),
        };
        self.snp = offered(SNP).then(Snp::find);
        for module in ["kvm", "kvm_amd", "kvm_intel"] {
            for parameter in [
                "gmem_in_place_conversion",
                "sev",
                "sev_es",
                "sev_snp",
                "tdx",
                "tdp_mmu",
                "lab_tee",
            ] {
                let value = line(&format!("/sys/module/{module}/parameters/{parameter}"));
                if !value.is_empty() {
                    self.parameters
                        .push((format!("{module}.{parameter}"), value));
                }
            }
        }
        self.tdx = offered(TDX).then(|| Tdx {
            switched_on: line("/sys/module/kvm_intel/parameters/tdx") == "Y",
        });
        Ok(())
    }

    /// A VM of this type, asked and with a block in it for a moment.
    fn try_vm(&mut self, kvm: &File, kind: usize, config: &BlockConfig) -> Result<String, String> {
        let name = VM_TYPES[kind];
        // SAFETY: a number; the result is a descriptor that nobody else has.
        let vm = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, kind as libc::c_ulong) };
        if vm < 0 {
            return Err(format!(
                "making a {name} VM: {}",
                io::Error::last_os_error()
            ));
        }
        // SAFETY: as above.
        let vm = unsafe { OwnedFd::from_raw_fd(vm) };
        let vm = Vm::new(&vm).map_err(|error| error.to_string())?;
        self.probes.push((name, vm.probe().to_string()));
        match Block::new(&vm, config) {
            Ok(block) => Ok(block.backing().to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn find_devices(&mut self) {
        self.iommufd = Path::new("/dev/iommu").exists();
        self.vfio_pci = Path::new("/sys/bus/pci/drivers/vfio-pci").exists();
        self.vfio_cdev = Path::new("/sys/class/vfio-dev").exists();
        self.iommus = names("/sys/class/iommu");
        self.debugfs = fs::read_dir("/sys/kernel/debug/kvm").is_ok();
        self.tracefs = fs::read_dir("/sys/kernel/tracing/events").is_ok();
    }

    pub fn to_json(&self) -> Value {
        let backing = |found: &Result<String, String>| match found {
            Ok(backing) => json!({"backing": backing}),
            Err(reason) => json!({"none": reason}),
        };
        let map = |pairs: &[(String, String)]| -> Value {
            pairs
                .iter()
                .map(|(name, value)| (name.clone(), json!(value)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let probes: Vec<_> = self
            .probes
            .iter()
            .map(|(name, said)| (name.to_string(), said.clone()))
            .collect();
        json!({
            "kernel": self.kernel, "processor": self.processor, "processor_flags": self.flags,
            "processors": self.processors, "memory_gib": (self.memory_bytes as f64 / f64::from(1 << 30) * 10.0).round() / 10.0,
            "numa_nodes": self.nodes,
            "kvm_capabilities": self.capabilities.iter().map(|(name, value)| (name.to_string(), json!(value)))
                .collect::<serde_json::Map<_, _>>(),
            "vm_types": self.vm_types,
            "ordinary_vm": backing(&self.ordinary), "sw_protected_vm": backing(&self.sw_protected),
            "library_says": map(&probes), "converts_in_place": self.in_place(),
            "snp": self.snp.as_ref().map(|snp| json!({
                "c_bit": snp.c_bit, "reduced_phys_bits": snp.reduced_bits, "dev_sev": snp.has_device,
            })),
            "tdx": self.tdx.as_ref().map(|tdx| json!({"kvm_intel_tdx": tdx.switched_on})),
            "module_parameters": map(&self.parameters),
            "iommufd": self.iommufd, "vfio_pci": self.vfio_pci, "vfio_cdev": self.vfio_cdev, "iommus": self.iommus,
            "huge_pages": self.huge_pages.iter().map(|(bytes, pages, free)| json!({
                "page_kib": bytes >> 10, "pages": pages, "free": free,
            })).collect::<Vec<_>>(),
            "debugfs": self.debugfs, "tracefs": self.tracefs, "lockdown": self.lockdown,
        })
    }

    /// For people: a line per fact.
    pub fn lines(&self) -> Vec<String> {
        let yes = |is: bool| if is { "yes" } else { "no" };
        let backing = |found: &Result<String, String>| match found {
            Ok(backing) => format!("yes, {backing}"),
            Err(reason) => format!("no: {reason}"),
        };
        let list = |words: &[String]| match words {
            [] => "none".to_string(),
            words => words.join(", "),
        };
        let snp = self.snp.as_ref().map_or("no".into(), |snp| {
            let device = if snp.has_device {
                ""
            } else {
                ", but no /dev/sev"
            };
            format!(
                "yes, C-bit {}, {} address bits fewer{device}",
                snp.c_bit, snp.reduced_bits
            )
        });
        let tdx = self.tdx.as_ref().map_or("no", |_| "yes");
        let pools = self.huge_pages.iter();
        let pools: Vec<_> = pools
            .map(|(bytes, pages, free)| format!("{pages} of {} KiB ({free} free)", bytes >> 10))
            .collect();
        vec![
            format!("kernel                 {}", self.kernel),
            format!(
                "processor              {} ({}), {} threads, {} NUMA nodes",
                self.processor,
                self.flags.join(" "),
                self.processors,
                self.nodes
            ),
            format!(
                "memory                 {:.1} GiB",
                self.memory_bytes as f64 / f64::from(1 << 30)
            ),
            format!("huge pages             {}", list(&pools)),
            format!("KVM's VM types         {}", self.vm_types.join(", ")),
            format!("ordinary VMs           {}", backing(&self.ordinary)),
            format!("SW_PROTECTED VMs       {}", backing(&self.sw_protected)),
            format!("converts in place      {}", yes(self.in_place())),
            format!("SEV-SNP                {snp}"),
            format!("TDX                    {tdx}"),
            format!(
                "iommufd, vfio-pci      {}, {}",
                yes(self.iommufd),
                yes(self.vfio_pci)
            ),
            format!("IOMMUs                 {}", list(&self.iommus)),
            format!(
                "debugfs, tracefs       {}, {} (lockdown: {})",
                yes(self.debugfs),
                yes(self.tracefs),
                self.lockdown
            ),
        ]
    }
}

impl Snp {
    fn find() -> Self {
        let leaf = 0x8000_001f;
        let highest = std::arch::x86_64::__cpuid(0x8000_0000).eax;
        let word = if highest >= leaf {
            std::arch::x86_64::__cpuid(leaf).ebx
        } else {
            0
        };
        Self {
            c_bit: u64::from(word & 0x3f),
            // QEMU wants one at least; a machine that encrypts nothing says none.
            reduced_bits: u64::from((word >> 6) & 0x3f).max(1),
            has_device: Path::new("/dev/sev").exists(),
        }
    }
}

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn line(path: &str) -> String {
    text(path).trim().to_string()
}

fn names(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

fn processor(cpuinfo: &str) -> String {
    let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    lines
        .find(|(name, _)| name.trim() == "model name")
        .map_or_else(|| "unknown".into(), |(_, value)| value.trim().to_string())
}

/// Those that tell what a host can do for guests.
fn flags(cpuinfo: &str) -> Vec<&'static str> {
    const TOLD: [&str; 9] = [
        "vmx",
        "svm",
        "ept",
        "npt",
        "sev",
        "sev_es",
        "sev_snp",
        "tdx_host_platform",
        "hypervisor",
    ];
    let line = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    TOLD.into_iter()
        .filter(|flag| line.split_whitespace().any(|word| word == *flag))
        .collect()
}

/// A number of /proc/meminfo, in bytes.
pub fn memory(meminfo: &str, name: &str) -> u64 {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix(name));
    let number = rest.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    number.unwrap_or(0) << 10
}

/// The one in brackets.
fn chosen(text: &str) -> String {
    let inside = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or_else(|| "none".into(), |(word, _)| word.to_string())
}

fn pools() -> Vec<(u64, u64, u64)> {
    const DIRECTORY: &str = "/sys/kernel/mm/hugepages";
    let of = |name: &String| {
        let kib: u64 = name
            .strip_prefix("hugepages-")?
            .strip_suffix("kB")?
            .parse()
            .ok()?;
        let number = |file: &str| {
            line(&format!("{DIRECTORY}/{name}/{file}"))
                .parse::<u64>()
                .ok()
        };
        Some((
            kib << 10,
            number("nr_hugepages")?,
            number("free_hugepages")?,
        ))
    };
    names(DIRECTORY).iter().filter_map(of).collect()
}

fn no_kvm(error: &io::Error, flags: &[&str]) -> String {
    let remedy = match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => "run this as root, and in a container with the device",
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) if flags.contains(&"svm") => "`modprobe kvm_amd`, and if that fails switch SVM on in the firmware's setup",
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) if flags.contains(&"vmx") => "`modprobe kvm_intel`, and if that fails switch VT-x on in the firmware's setup",
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => "this processor shows neither SVM nor VT-x: switch it on in the firmware's setup, or, in a virtual machine, nested virtualisation for it",
        _ => "without KVM there is nothing to run",
    };
    format!("can't open /dev/kvm: {error}; {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_texts_are_read() {
        let cpuinfo = "processor\t: 0\nmodel name\t: AMD EPYC 9124\nflags\t\t: fpu svm npt svme sev_snp\n\nprocessor\t: 1\n";
        assert_eq!(processor(cpuinfo), "AMD EPYC 9124");
        assert_eq!(flags(cpuinfo), ["svm", "npt", "sev_snp"]);
        assert_eq!(processor(""), "unknown");
        assert_eq!(
            memory("MemTotal:  16 kB\nMemAvailable:  8 kB\n", "MemAvailable:"),
            8192
        );
        assert_eq!(memory("", "MemTotal:"), 0);
        assert_eq!(chosen("none [integrity] confidentiality"), "integrity");
        assert_eq!(chosen(""), "none");
    }

    #[test]
    fn without_kvm_the_remedy_fits_the_machine() {
        let of = |errno, flags: &[&str]| no_kvm(&io::Error::from_raw_os_error(errno), flags);
        assert!(of(libc::ENOENT, &["svm"]).contains("kvm_amd"));
        assert!(of(libc::ENOENT, &["vmx"]).contains("kvm_intel"));
        assert!(of(libc::ENOENT, &[]).contains("neither"));
        assert!(of(libc::EACCES, &["vmx"]).contains("root"));
    }
}
