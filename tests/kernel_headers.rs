// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every number and structure of `src/kernel/abi.rs` is that of the kernel's own headers.
//!
//! Uses the headers in `$GMEM_KERNEL_HEADERS/include` (what `make headers` leaves in `usr/`), else the
//! installed ones. What older headers don't have is reported as skipped, name by name; headers of
//! the version that `abi.rs` speaks of must have all of it.

mod common;

use common::skipped;
use gmem::kernel::abi::*;
use std::fs;
use std::mem::{offset_of, size_of};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Linux 7.3, as LINUX_VERSION_CODE has it.
const ABI_VERSION: u64 = (7 << 16) | (3 << 8);

struct Layout {
    rust_name: &'static str,
    c_name: &'static str,
    size: usize,
    /// Name in C, offset, size.
    fields: Vec<(&'static str, usize, usize)>,
}

fn size_of_field<S, F>(_: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! constants {
    ($($name:ident),* $(,)?) => {
        vec![$((stringify!($name), $name as u64)),*]
    };
}

macro_rules! layout {
    ($rust:ident is $c:literal { $($field:ident as $c_field:literal),* $(,)? }) => {
        Layout {
            rust_name: stringify!($rust),
            c_name: $c,
            size: size_of::<$rust>(),
            fields: vec![$((
                $c_field,
                offset_of!($rust, $field),
                size_of_field(|s: &$rust| &s.$field),
            )),*],
        }
    };
}

fn constants() -> Vec<(&'static str, u64)> {
    constants![
        KVM_GET_API_VERSION,
        KVM_CHECK_EXTENSION,
        KVM_SET_MEMORY_ATTRIBUTES,
        KVM_CREATE_GUEST_MEMFD,
        KVM_CAP_USER_MEMORY2,
        KVM_CAP_MEMORY_ATTRIBUTES,
        KVM_CAP_GUEST_MEMFD,
        KVM_CAP_GUEST_MEMFD_FLAGS,
        KVM_MEMORY_ATTRIBUTE_PRIVATE,
        GUEST_MEMFD_FLAG_MMAP,
        GUEST_MEMFD_FLAG_INIT_SHARED,
        IOMMU_IOAS_COPY,
        IOMMU_IOAS_MAP,
        IOMMU_IOAS_UNMAP,
        IOMMU_OPTION,
        IOMMU_VFIO_IOAS,
        IOMMU_IOAS_MAP_FILE,
        VFIO_IOMMU_UNMAP_DMA,
        IOMMU_OPTION_HUGE_PAGES,
        IOMMU_OPTION_OP_SET,
        IOMMU_OPTION_OP_GET,
        IOMMU_VFIO_IOAS_SET,
        KCMP_FILE,
        IOMMU_IOAS_MAP_FIXED_IOVA,
        IOMMU_IOAS_MAP_WRITEABLE,
        IOMMU_IOAS_MAP_READABLE,
    ]
}

fn layouts() -> Vec<Layout> {
    vec![
        layout!(KvmMemoryAttributes is "kvm_memory_attributes" {
            address as "address", size as "size", attributes as "attributes", flags as "flags",
        }),
        layout!(KvmCreateGuestMemfd is "kvm_create_guest_memfd" {
            size as "size", flags as "flags", reserved as "reserved",
        }),
        layout!(IommuIoasCopy is "iommu_ioas_copy" {
            size as "size", flags as "flags", dst_ioas_id as "dst_ioas_id",
            src_ioas_id as "src_ioas_id", length as "length", dst_iova as "dst_iova",
            src_iova as "src_iova",
        }),
        layout!(IommuIoasMap is "iommu_ioas_map" {
            size as "size", flags as "flags", ioas_id as "ioas_id", reserved as "__reserved",
            user_va as "user_va", length as "length", iova as "iova",
        }),
        layout!(IommuIoasMapFile is "iommu_ioas_map_file" {
            size as "size", flags as "flags", ioas_id as "ioas_id", fd as "fd", start as "start",
            length as "length", iova as "iova",
        }),
        layout!(IommuIoasUnmap is "iommu_ioas_unmap" {
            size as "size", ioas_id as "ioas_id", iova as "iova", length as "length",
        }),
        layout!(IommuOption is "iommu_option" {
            size as "size", option_id as "option_id", op as "op", reserved as "__reserved",
            object_id as "object_id", val64 as "val64",
        }),
        layout!(IommuVfioIoas is "iommu_vfio_ioas" {
            size as "size", ioas_id as "ioas_id", op as "op", reserved as "__reserved",
        }),
        layout!(VfioIommuType1DmaUnmap is "vfio_iommu_type1_dma_unmap" {
            argsz as "argsz", flags as "flags", iova as "iova", size as "size",
        }),
    ]
}

/// A directory of this test's own.
fn scratch() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernel_headers");
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// A compiler and the headers that it is pointed at.
struct Headers {
    include: Option<PathBuf>,
}

impl Headers {
    fn in_use() -> Self {
        let include = std::env::var_os("GMEM_KERNEL_HEADERS").map(|dir| {
            let include = PathBuf::from(dir).join("include");
            assert!(
                include.join("linux/kvm.h").is_file(),
                "GMEM_KERNEL_HEADERS: there is no {}",
                include.join("linux/kvm.h").display()
            );
            include
        });
        Self { include }
    }

    fn compile(&self, name: &str, statements: &str) -> Result<PathBuf, Output> {
        let source = scratch().join(format!("{name}.c"));
        let program = scratch().join(name);
        let text = format!(
            "#include <stddef.h>\n\
             #include <stdio.h>\n\
             #include <linux/version.h>\n\
             #include <linux/kcmp.h>\n\
             #include <linux/kvm.h>\n\
             #include <linux/vfio.h>\n\
             #if __has_include(<linux/iommufd.h>)\n\
             #include <linux/iommufd.h>\n\
             #endif\n\
             int main(void)\n{{\n{statements}\nreturn 0;\n}}\n"
        );
        fs::write(&source, text).unwrap();
        let mut gcc = Command::new("gcc");
        gcc.arg("-std=gnu11").arg("-o").arg(&program);
        if let Some(include) = &self.include {
            gcc.arg("-isystem").arg(include);
        }
        let output = gcc
            .arg(&source)
            .output()
            .expect("gcc was there a moment ago");
        match output.status.success() {
            true => Ok(program),
            false => Err(output),
        }
    }

    /// The numbers that a program of `statements` prints.
    fn numbers(&self, name: &str, statements: &str) -> Result<Vec<u64>, Output> {
        let program = self.compile(name, statements)?;
        let output = Command::new(&program).output().unwrap();
        assert!(output.status.success(), "{name}: {output:?}");
        Ok(String::from_utf8(output.stdout)
            .unwrap()
            .split_whitespace()
            .map(|number| number.parse().unwrap())
            .collect())
    }
}

fn print(expression: &str) -> String {
    format!("printf(\"%llu\\n\", (unsigned long long)({expression}));\n")
}

#[test]
fn every_number_and_layout_is_the_kernels() {
    if Command::new("gcc").arg("--version").output().is_err() {
        skipped("every_number_and_layout_is_the_kernels", "there is no gcc");
        return;
    }
    let headers = Headers::in_use();
    let version = headers
        .numbers("version", &print("LINUX_VERSION_CODE"))
        .unwrap_or_else(|output| panic!("linux/kvm.h does not compile: {output:?}"))[0];
    let complete = version >= ABI_VERSION;
    let readable = format!("{}.{}", version >> 16, (version >> 8) & 0xff);
    let mut wrong = Vec::new();
    let missing = |name: &str, what: &str| {
        let text = format!("the headers of Linux {readable} have no {what}");
        if complete {
            return Some(text);
        }
        skipped(&format!("kernel_headers/{name}"), text);
        None
    };

    let mut compared = 0;
    for (name, ours) in constants() {
        match headers.numbers(name, &print(name)) {
            Err(_) => wrong.extend(missing(name, name)),
            Ok(theirs) if theirs == [ours] => compared += 1,
            Ok(theirs) => wrong.push(format!("{name} is {ours}, in the headers {theirs:?}")),
        }
    }
    for layout in layouts() {
        let tag = format!("struct {}", layout.c_name);
        let size = print(&format!("sizeof({tag})"));
        if headers.compile(layout.rust_name, &size).is_err() {
            wrong.extend(missing(layout.rust_name, &tag));
            continue;
        }
        let fields: String = layout
            .fields
            .iter()
            .map(|(field, ..)| {
                let size = print(&format!("sizeof((({tag} *)0)->{field})"));
                print(&format!("offsetof({tag}, {field})")) + &size
            })
            .collect();
        let ours: Vec<u64> = std::iter::once(layout.size)
            .chain(layout.fields.iter().flat_map(|&(_, at, size)| [at, size]))
            .map(|number| number as u64)
            .collect();
        match headers.numbers(layout.rust_name, &(size + &fields)) {
            Err(output) => wrong.push(format!("{tag}: {output:?}")),
            Ok(theirs) if theirs == ours => compared += 1,
            Ok(theirs) => wrong.push(format!(
                "{}: size, then offset and size of each field, are {ours:?}, in the headers \
                 {theirs:?}",
                layout.rust_name
            )),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // KVM_CHECK_EXTENSION is older than any kernel that has a KVM: something is always compared.
    assert!(compared > 0, "nothing was compared");
}

/// The names that `abi.rs` makes public, in order.
fn names_in(source: &str, keyword: &str) -> Vec<String> {
    let prefix = format!("pub {keyword} ");
    source
        .lines()
        .filter_map(|line| line.strip_prefix(&prefix))
        .map(|rest| {
            let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            rest.chars().take_while(|&c| is_name(c)).collect()
        })
        .collect()
}

#[test]
fn no_line_of_the_abi_goes_unchecked() {
    let source =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernel/abi.rs"))
            .unwrap();
    let checked: Vec<&str> = constants().iter().map(|&(name, _)| name).collect();
    assert_eq!(names_in(&source, "const"), checked);
    let layouts = layouts();
    let checked: Vec<&str> = layouts.iter().map(|layout| layout.rust_name).collect();
    assert_eq!(names_in(&source, "struct"), checked);

    let public = source
        .lines()
        .filter(|l| l.trim_start().starts_with("pub "));
    let fields: usize = layouts.iter().map(|layout| layout.fields.len()).sum();
    assert_eq!(public.count(), constants().len() + layouts.len() + fields);
}

#[test]
fn no_structure_has_padding_that_would_leak_or_be_refused() {
    for layout in layouts() {
        let mut end = 0;
        for (field, offset, size) in layout.fields {
            assert_eq!(offset, end, "{}: a hole before {field}", layout.rust_name);
            end = offset + size;
        }
        assert_eq!(end, layout.size, "{}: a hole at the end", layout.rust_name);
    }
}
