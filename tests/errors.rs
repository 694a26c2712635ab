// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a program can tell of an error without reading its sentence, and the sentence: each cause, as it comes
//! about.

#[path = "../benches/counting/mod.rs"]
#[allow(dead_code)]
mod counting;

use counting::Heap;
use gmem::kernel::fake::{FakeKernel, VmKind};
use gmem::{
    Attribute, Backing, BackingChoice, Block, BlockConfig, CallError, Cause, Change, DmaPath,
    DmaSplit, Error, Listener, NumaPolicy, Offset, PolicyMode, Span, Vm, Window, WindowConfig,
};
use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;
use Attribute::{Private, Shared};

const PAGE: u64 = gmem::PAGE_SIZE;
const HUGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
const POOL: &str = "the pool's size is in /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

struct Rig {
    kernel: Arc<FakeKernel>,
    vm: Arc<Vm>,
    fd: File,
}

impl Rig {
    fn new(kind: VmKind) -> Self {
        let kernel = Arc::new(FakeKernel::new(kind));
        let fd = File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel.clone(), &fd).unwrap();
        Self { kernel, vm, fd }
    }

    /// A block that is bound at its offsets.
    fn block(&self, config: &BlockConfig) -> Arc<Block> {
        let block = Block::new(&self.vm, config).unwrap();
        block.bind(0, config.size, 0).unwrap().keep();
        block
    }

    fn ram(&self) -> Arc<Block> {
        self.block(&ram())
    }

    fn window(&self, block: &Arc<Block>) -> gmem::Result<Window> {
        block.add_window(
            &self.fd,
            &WindowConfig {
                ioas_id: 5,
                offset: 0,
                length: block.span().size_bytes(),
                iova: GIB,
                readonly: false,
            },
        )
    }

    fn fail(&self, call: &'static str, errno: i32) {
        self.kernel
            .fail_if(move |made| (made == call).then_some(errno));
    }
}

fn ram() -> BlockConfig {
    BlockConfig::confidential("ram", HUGE, Shared)
}

fn huge() -> BlockConfig {
    BlockConfig {
        hugetlb: Some(HUGE),
        ..BlockConfig::confidential("ram", HUGE, Private)
    }
}

fn call(call: &'static str, errno: i32) -> CallError {
    CallError { call, errno }
}

/// What is expected of an error.
struct Fields<'a> {
    cause: Cause,
    errno: i32,
    object: Option<&'a str>,
    call: Option<CallError>,
    remedy: Option<&'a str>,
    sentence: &'a str,
}

#[derive(Default)]
struct Seen(BTreeSet<String>);

impl Seen {
    fn check(&mut self, error: &Error, fields: Fields) {
        let text = format!("{error:#}");
        assert_eq!(text, fields.sentence);
        assert_eq!(*error.cause(), fields.cause, "{text}");
        assert_eq!(error.errno(), fields.errno, "{text}");
        assert_eq!(error.object(), fields.object, "{text}");
        assert_eq!(error.call(), fields.call.as_ref(), "{text}");
        assert_eq!(error.remedy(), fields.remedy, "{text}");
        // What a sentence is made from is in it.
        let parts = [error.object(), Some(error.what()), error.remedy()];
        for part in parts.into_iter().flatten() {
            assert!(text.contains(part), "{text}");
        }
        let name = format!("{:?}", error.cause());
        let end = name.find([' ', '(']).unwrap_or(name.len());
        self.0.insert(name[..end].to_string());
    }

    /// Whose cause is no more than an errno.
    fn plain(&mut self, error: &Error, cause: Cause, object: Option<&str>, sentence: &str) {
        self.told(error, cause, object, None, sentence);
    }

    fn told(
        &mut self,
        error: &Error,
        cause: Cause,
        object: Option<&str>,
        remedy: Option<&str>,
        sentence: &str,
    ) {
        let errno = match cause {
            Cause::Invalid => libc::EINVAL,
            Cause::Unsupported => libc::ENOTSUP,
            Cause::Busy | Cause::Detached | Cause::Ended => libc::EBUSY,
            Cause::Exists => libc::EEXIST,
            Cause::Denied => libc::EACCES,
            Cause::Poisoned { .. } => libc::EIO,
            Cause::OutOfMemory => libc::ENOMEM,
            Cause::NoThread => libc::EAGAIN,
            _ => libc::ENOSPC,
        };
        let call = None;
        self.check(
            error,
            Fields {
                cause,
                errno,
                object,
                call,
                remedy,
                sentence,
            },
        );
    }
}

/// On the way that most requests take, a result is as good as free.
const _: () = assert!(size_of::<gmem::Result<()>>() == size_of::<usize>());

/// One by one, and nothing beside it: one has no address space for a thread's stack, and one no memory.
#[test]
fn causes_are_told_apart_by_fields_and_the_sentence_has_them_all() {
    let mut seen = Seen::default();
    no_thread(&mut seen);
    senseless(&mut seen);
    at_the_wrong_time(&mut seen);
    limits(&mut seen);
    pools(&mut seen);
    pages(&mut seen);
    others(&mut seen);
    devices(&mut seen);
    // As the type has them.
    let source = include_str!("../src/error.rs");
    let (_, body) = source.split_once("pub enum Cause {\n").unwrap();
    let (body, _) = body.split_once("\n}\n").unwrap();
    let variants = body.lines().filter_map(|line| {
        let name = line.strip_prefix("    ")?;
        let end = name.find([' ', '(', ',']).unwrap_or(name.len());
        name.starts_with(char::is_uppercase)
            .then(|| name[..end].to_string())
    });
    assert_eq!(seen.0, variants.collect());
}

/// First of all: the C library keeps the stacks of threads that have ended.
fn no_thread(seen: &mut Seen) {
    let rig = Rig::new(VmKind::Confidential);
    let block = rig.block(&BlockConfig {
        policy: NumaPolicy::new(PolicyMode::Bind, &[1]),
        ..ram()
    });
    let pages: u64 = std::fs::read_to_string("/proc/self/statm")
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel writes one such structure.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) }, 0);
    // SAFETY: it reads one.
    let set = |limit| unsafe { libc::setrlimit(libc::RLIMIT_AS, limit) };
    let little = libc::rlimit {
        rlim_cur: pages * PAGE + (1 << 20),
        ..limit
    };
    assert_eq!(set(&little), 0);
    let filled = block.preallocate(2);
    assert_eq!(set(&limit), 0);
    seen.plain(
        &filled.unwrap_err(),
        Cause::NoThread,
        Some("ram"),
        "ram: there is no thread that could allocate by its NUMA policy",
    );
    block.preallocate(2).unwrap();
}

fn senseless(seen: &mut Seen) {
    let rig = Rig::new(VmKind::Confidential);
    let block = rig.ram();
    seen.plain(
        &rig.vm.convert(1, PAGE, Private).unwrap_err(),
        Cause::Invalid,
        None,
        "0x1000 bytes at gpa 0x1 are not whole pages of 4096 bytes",
    );
    seen.plain(
        &block.bind(0, 0, GIB).unwrap_err(),
        Cause::Invalid,
        Some("ram"),
        "ram: 0x0 bytes at offset 0x0 are none",
    );
    seen.plain(
        &block.bind(0, HUGE, GIB).unwrap_err(),
        Cause::Exists,
        Some("ram"),
        "ram: offset 0x0..0x200000 can't appear at gpa 0x40000000..0x40200000 too: offset 0x0..0x200000 is \
         bound at gpa 0x0..0x200000",
    );
    seen.told(
        &Block::new(&rig.vm, &BlockConfig { confidential: false, ..huge_shared() }).unwrap_err(),
        Cause::Unsupported,
        Some("ram"),
        Some("leave it out"),
        "ram: hugetlb is for confidential VMs: the kernel has no huge pages for a guest_memfd that is all \
         shared; leave it out",
    );
    rig.vm.convert(PAGE, PAGE, Private).unwrap();
    seen.plain(
        &block.check_access(0, HUGE).unwrap_err(),
        Cause::Denied,
        Some("ram"),
        "ram: 0x200000 bytes at offset 0x0 are private to the guest",
    );
}

fn huge_shared() -> BlockConfig {
    BlockConfig {
        initial: Shared,
        ..huge()
    }
}

/// Three kinds of EBUSY.
fn at_the_wrong_time(seen: &mut Seen) {
    let rig = Rig::new(VmKind::Confidential);
    let block = rig.ram();
    seen.plain(
        &block.check_unused().unwrap_err(),
        Cause::Busy,
        Some("ram"),
        "ram: it is still bound",
    );
    rig.vm.detach().unwrap();
    seen.plain(
        &rig.vm.convert(0, PAGE, Private).unwrap_err(),
        Cause::Detached,
        None,
        "the VM has no file until it is rebuilt",
    );
    rig.vm.end().unwrap();
    seen.plain(
        &rig.vm.convert(0, PAGE, Private).unwrap_err(),
        Cause::Ended,
        None,
        "the VM is at its end",
    );
}

/// Three kinds of ENOSPC, and one of ENOMEM, that are the library's own.
fn limits(seen: &mut Seen) {
    let rig = Rig::new(VmKind::Confidential);
    let _block = rig.block(&BlockConfig {
        max_runs: Some(1),
        max_request: Some(4 * PAGE),
        ..ram()
    });
    rig.vm.convert(0, PAGE, Private).unwrap();
    seen.told(
        &rig.vm.convert(2 * PAGE, PAGE, Private).unwrap_err(),
        Cause::MaxRuns { runs: 2, most: 1 },
        Some("ram"),
        Some("a larger one takes more memory of the host"),
        "ram: making offset 0x2000..0x3000 private would leave 2 private runs; max-runs is 1; a larger one \
         takes more memory of the host",
    );
    seen.told(
        &rig.vm.convert(PAGE, 5 * PAGE, Private).unwrap_err(),
        Cause::MaxRequest { bytes: 5 * PAGE, most: 4 * PAGE },
        Some("ram"),
        Some("ask for less at once, or give the block a larger one"),
        "ram: making offset 0x1000..0x6000 private would change 0x5000 bytes at once, from the first page that \
         changes to the last, in all blocks; max-request is 0x4000; ask for less at once, or give the block a \
         larger one",
    );

    let rig = Rig::new(VmKind::InPlace);
    rig.kernel.set_pool(512);
    let block = rig.block(&BlockConfig {
        hugetlb: Some(GIB),
        ..BlockConfig::confidential("ram", GIB, Shared)
    });
    seen.told(
        &block.discard(PAGE, GIB / 2).unwrap_err(),
        Cause::MaxZeroed { bytes: GIB / 2, most: 32 << 20 },
        Some("ram"),
        Some("discard smaller ranges, or whole huge pages"),
        "ram: discarding offset 0x1000..0x20001000: 0x20000000 bytes are parts of huge pages, whose memory can't \
         be given back; no more than 0x2000000 are zeroed instead; discard smaller ranges, or whole huge pages",
    );

    let rig = Rig::new(VmKind::Confidential);
    let _block = rig.block(&BlockConfig { size: GIB, ..ram() });
    for page in (0..GIB / PAGE).step_by(2) {
        rig.vm.convert(page * PAGE, PAGE, Private).unwrap();
    }
    // A bit a page is 32 KiB.
    let refused = Heap::now().with_most(16 << 10, || rig.vm.convert(0, GIB, Private));
    seen.told(
        &refused.unwrap_err(),
        Cause::OutOfMemory,
        Some("ram"),
        Some("free some, or ask for less at once"),
        "ram: making offset 0x0..0x40000000 private takes a bit of memory for each page, which there is not; free \
         some, or ask for less at once",
    );
}

/// The kernel's ENOSPC and ENOMEM, of which a pool's are told apart. Both may pass: a guest may ask again.
fn pools(seen: &mut Seen) {
    let rig = Rig::new(VmKind::Confidential);
    rig.kernel.set_pool(0);
    let _block = rig.block(&huge());
    let empty = call("fallocate", libc::ENOSPC);
    seen.check(
        &rig.vm.convert(0, PAGE, Shared).unwrap_err(),
        Fields {
            cause: Cause::PoolEmpty(empty.clone()),
            errno: libc::ENOMEM,
            object: Some("ram"),
            call: Some(empty),
            remedy: Some(POOL),
            sentence: &format!(
                "ram: taking huge pages of 2 MiB for offset 0x0..0x1000 from the host's pool: fallocate: No space left \
                 on device; {POOL}"
            ),
        },
    );
    rig.fail("fallocate", libc::ENOMEM);
    let none = call("fallocate", libc::ENOMEM);
    seen.check(
        &rig.vm.convert(0, PAGE, Shared).unwrap_err(),
        Fields {
            cause: Cause::Call(none.clone()),
            errno: libc::ENOMEM,
            object: Some("ram"),
            call: Some(none),
            remedy: Some(POOL),
            sentence: &format!(
                "ram: taking huge pages of 2 MiB for offset 0x0..0x1000 from the host's pool: fallocate: Cannot allocate \
                 memory; {POOL}"
            ),
        },
    );
    let rig = Rig::new(VmKind::InPlace);
    rig.kernel.set_pool(0);
    let empty = call("KVM_CREATE_GUEST_MEMFD", libc::ENOMEM);
    seen.check(
        &Block::new(&rig.vm, &huge()).unwrap_err(),
        Fields {
            cause: Cause::PoolEmpty(empty.clone()),
            errno: libc::ENOMEM,
            object: Some("ram"),
            call: Some(empty),
            remedy: Some(POOL),
            sentence: &format!(
                "ram: creating a guest_memfd of 0x200000 bytes in huge pages of 2 MiB, all of them from the host's pool \
                 at once, flags 0x5: KVM_CREATE_GUEST_MEMFD: Cannot allocate memory; {POOL}"
            ),
        },
    );
    let rig = Rig::new(VmKind::Confidential);
    let _block = rig.ram();
    rig.fail("KVM_SET_MEMORY_ATTRIBUTES", libc::ENOMEM);
    let none = call("KVM_SET_MEMORY_ATTRIBUTES", libc::ENOMEM);
    seen.check(
        &rig.vm.convert(0, PAGE, Private).unwrap_err(),
        Fields {
            cause: Cause::Call(none.clone()),
            errno: libc::ENOMEM,
            object: Some("ram"),
            call: Some(none),
            remedy: None,
            sentence: "ram: making gpa 0x0..0x1000 private: KVM_SET_MEMORY_ATTRIBUTES: Cannot allocate memory",
        },
    );
}

/// Two kinds of pages that can't be had at this moment.
fn pages(seen: &mut Seen) {
    let rig = Rig::new(VmKind::InPlace);
    let block = rig.ram();
    rig.kernel.hold(block.file(Private), PAGE, usize::MAX);
    let again = call("KVM_SET_MEMORY_ATTRIBUTES2", libc::EAGAIN);
    let error = rig.vm.convert(0, HUGE, Private).unwrap_err();
    seen.check(
        &error,
        Fields {
            cause: Cause::Held {
                offset: PAGE,
                host: block.host() as u64 + PAGE,
                call: again.clone(),
            },
            errno: libc::EAGAIN,
            object: Some("ram"),
            call: Some(again),
            remedy: None,
            sentence: "ram: making offset 0x0..0x200000 private, stopped at offset 0x1000: KVM_SET_MEMORY_ATTRIBUTES2: \
                       Resource temporarily unavailable",
        },
    );
    // The whole sentence names who holds it, if that is to be found.
    let text = error.to_string();
    assert!(text.contains("at offset 0x1000 (no holder found"), "{text}");

    block.poison(0, 2 * PAGE).unwrap();
    let lost = Span::new(Offset(0), 2 * PAGE).unwrap();
    seen.told(
        &rig.vm.convert(0, HUGE, Private).unwrap_err(),
        Cause::Poisoned { lost },
        Some("ram"),
        Some("a reset of the VM replaces it"),
        "ram: the host has lost the shared memory of offset 0x0..0x2000 (poisoned); a reset of the VM replaces it",
    );
}

struct Refuses;

impl Listener for Refuses {
    fn begin(&self, _: &Change) -> Result<(), i32> {
        Err(libc::EPERM)
    }

    fn end(&self, _: &Change, _: bool) {}
}

fn others(seen: &mut Seen) {
    let rig = Rig::new(VmKind::Confidential);
    let block = rig.ram();
    block.add_listener(Arc::new(Refuses)).keep();
    seen.check(
        &rig.vm.convert(0, PAGE, Private).unwrap_err(),
        Fields {
            cause: Cause::Refused { errno: libc::EPERM },
            errno: libc::EPERM,
            object: Some("ram"),
            call: None,
            remedy: None,
            sentence: "ram: making offset 0x0..0x1000 private: a listener refused: Operation not permitted",
        },
    );
}

/// What devices can't have, and the call that says so, whatever is made of it.
fn devices(seen: &mut Seen) {
    let rig = Rig::new(VmKind::Confidential);
    let block = rig.block(&BlockConfig {
        dma_split: DmaSplit::Page,
        ..ram()
    });
    rig.fail("IOMMU_IOAS_MAP_FILE", libc::ENOMEM);
    let none = call("IOMMU_IOAS_MAP_FILE", libc::ENOMEM);
    seen.check(
        &rig.window(&block).unwrap_err(),
        Fields {
            cause: Cause::Call(none.clone()),
            errno: libc::ENOMEM,
            object: Some("ram"),
            call: Some(none),
            remedy: Some("pinned memory counts against RLIMIT_MEMLOCK: see ulimit -l"),
            sentence: "ram: mapping offset 0x0..0x1000 for devices at iova 0x40000000..0x40001000 of IOAS 5: \
                       IOMMU_IOAS_MAP_FILE: Cannot allocate memory; pinned memory counts against RLIMIT_MEMLOCK: see \
                       ulimit -l",
        },
    );
    rig.fail("IOMMU_OPTION", libc::ENOTTY);
    let no_iommufd = call("IOMMU_OPTION", libc::ENOTTY);
    seen.check(
        &rig.window(&block).unwrap_err(),
        Fields {
            cause: Cause::Call(no_iommufd.clone()),
            errno: libc::ENOTTY,
            object: Some("ram"),
            call: Some(no_iommufd),
            remedy: Some("the file is no /dev/iommu, or its kernel lacks the call"),
            sentence: "ram: looking for IOAS 5 in its iommufd: IOMMU_OPTION: Inappropriate ioctl for device; the file is \
                       no /dev/iommu, or its kernel lacks the call",
        },
    );
    rig.kernel.fail(None);

    let no_iommufd = call("IOMMU_OPTION", libc::ENOTTY);
    seen.check(
        // The one that needs no kernel in memory: no file of another kind knows the call.
        &gmem::prepare_ioas(&rig.fd, 5).unwrap_err(),
        Fields {
            cause: Cause::Call(no_iommufd.clone()),
            errno: libc::ENOTTY,
            object: Some("IOAS 5"),
            call: Some(no_iommufd),
            remedy: Some("the file is no /dev/iommu, or its kernel lacks the call"),
            sentence: "IOAS 5: turning huge pages off: IOMMU_OPTION: Inappropriate ioctl for device; the file is no \
                       /dev/iommu, or its kernel lacks the call",
        },
    );

    // An IOAS that is not prepared.
    let cut = Rig::new(VmKind::Confidential);
    let block = cut.block(&BlockConfig {
        dma_split: DmaSplit::Cut,
        ..ram()
    });
    seen.told(
        &cut.window(&block).unwrap_err(),
        Cause::Unsupported,
        Some("ram"),
        Some("it has to be prepared before its first mapping (gmem_ioas_prepare)"),
        "ram: dma-split=cut can't be: IOAS 5 may have huge mappings, which can't be cut; it has to be prepared before \
         its first mapping (gmem_ioas_prepare)",
    );

    // A call that has failed is told of, where the cause is another.
    let rig = Rig::new(VmKind::InPlace);
    let block = rig.block(&BlockConfig {
        dma: DmaPath::Fd,
        backing: BackingChoice::Only(Backing::InPlace),
        dma_split: DmaSplit::Page,
        ..ram()
    });
    seen.check(
        &rig.window(&block).unwrap_err(),
        Fields {
            cause: Cause::Unsupported,
            errno: libc::ENOTSUP,
            object: Some("ram"),
            call: Some(call("IOMMU_IOAS_MAP_FILE", libc::EINVAL)),
            remedy: Some("leave dma=auto"),
            sentence: "ram: this kernel can't map an in-place block for devices by fd: mapping offset 0x0..0x1000 for \
                       devices at iova 0x40000000..0x40001000 of IOAS 5: IOMMU_IOAS_MAP_FILE: Invalid argument; leave \
                       dma=auto",
        },
    );
}

/// TDX's RETRY: the host may get memory, and the guest's own pattern stays what it is.
#[test]
fn a_guest_asks_again_for_want_of_memory_and_not_where_a_bound_refuses() {
    let rig = Rig::new(VmKind::Confidential);
    rig.kernel.set_pool(0);
    let block = rig.block(&huge());
    let error = rig.vm.convert(0, PAGE, Shared).unwrap_err();
    assert_eq!(error.hypercall_result(true), libc::EAGAIN as u64, "{error}");
    assert_eq!(error.hypercall_result(false), libc::EINVAL as u64);
    rig.kernel.set_pool(1);
    rig.vm.convert(0, PAGE, Shared).unwrap();
    drop(block);

    let rig = Rig::new(VmKind::Confidential);
    let _block = rig.block(&BlockConfig {
        max_runs: Some(1),
        max_request: Some(4 * PAGE),
        ..ram()
    });
    rig.vm.convert(0, PAGE, Private).unwrap();
    for (gpa, size) in [(2 * PAGE, PAGE), (PAGE, 5 * PAGE)] {
        let error = rig.vm.convert(gpa, size, Private).unwrap_err();
        assert_eq!(error.hypercall_result(true), libc::EINVAL as u64, "{error}");
    }
}
