// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM on the kernel in memory, what several threads do to it, and what must hold afterwards.

mod check;
mod explore;
mod ops;

use explore::tell;
pub use explore::{begin_story, explore, explore_steps};
pub use ops::{Kind, Op};

use gmem_schedules::kernel::fake::{Failures, FakeKernel, VmKind};
use gmem_schedules::kernel::{Ioas, Kernel};
use gmem_schedules::{
    Attribute, Block, BlockConfig, DmaSplit, Gpa, Span, Vm, Window, WindowConfig,
};
use shuttle::rand::Rng;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

pub const PAGE: u64 = gmem_schedules::PAGE_SIZE;
const HUGE: u64 = 2 << 20;
/// Where the blocks are bound at first, next to each other.
pub const HOME: u64 = 0x10_0000;
/// Where they are bound for a while, far from each other.
const ELSEWHERE: u64 = 0x8000_0000;
/// IOVAs differ from guest addresses, so that a mix-up shows.
const IOVAS: u64 = 0x4000_0000;
/// Blocks that are there from the start; one more may come and go.
pub const BLOCKS: usize = 2;
/// IOASes of windows that stay; those that come and go have others.
const LASTING_IOASES: u32 = 2;
const IOASES: u32 = 8;

/// What a schedule runs on, all of it drawn anew for each.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub vm: Backing,
    pub split: DmaSplit,
    pub initial: Attribute,
    /// What everything comes in, in bytes: pages, or a fourth of a huge page each.
    pub grain: u64,
    /// So many of each block.
    pub pages: u64,
    /// Fails some calls of the kernel while the threads run.
    pub failures: Option<Failures>,
    /// Whether memory that pages leave is kept for a moment, which passes only for who says so.
    pub keeps: bool,
    /// Something is reset, and shared pages may lose their bytes.
    pub resets: bool,
    /// Whether the kernel tells one file from another.
    pub kcmp: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    Split,
    InPlace,
    Ordinary,
}

impl Setup {
    pub fn draw(backings: &[Backing]) -> Self {
        let rng = &mut shuttle::rand::thread_rng();
        let vm = backings[rng.gen_range(0..backings.len())];
        let splits = [DmaSplit::Page, DmaSplit::Cut, DmaSplit::Unit(2 * PAGE)];
        let split = splits[rng.gen_range(0..splits.len())];
        let private = vm != Backing::Ordinary && rng.gen_bool(0.5);
        Self {
            vm,
            split,
            initial: match private {
                true => Attribute::Private,
                false => Attribute::Shared,
            },
            grain: PAGE,
            pages: 6,
            failures: None,
            keeps: rng.gen_bool(0.5),
            resets: false,
            kcmp: rng.gen_bool(0.9),
        }
    }

    /// Of huge pages, two in each block.
    pub fn huge(mut self) -> Self {
        self.grain = HUGE / 4;
        self.pages = 8;
        if self.split != DmaSplit::Cut {
            self.split = DmaSplit::Unit(HUGE);
        }
        self
    }

    fn is_huge(&self) -> bool {
        self.grain != PAGE
    }

    /// Bytes that have memory together.
    fn huge_page(&self) -> u64 {
        match self.is_huge() {
            true => HUGE,
            false => PAGE,
        }
    }

    /// Some calls are to fail, as likely as not.
    pub fn may_fail(mut self) -> Self {
        let rng = &mut shuttle::rand::thread_rng();
        self.failures = rng.gen_bool(0.5).then(|| Failures {
            first: rng.gen_range(0..40),
            count: [1, 1, 2, 3, 8, usize::MAX][rng.gen_range(0..6)],
            errno: [libc::ENOMEM, libc::EAGAIN, libc::EBUSY][rng.gen_range(0..3)],
        });
        self
    }
}

/// A window, and who knows what it is to show.
#[derive(Clone)]
pub struct Shown {
    block: usize,
    ioas_id: u32,
    window: Arc<Window>,
    /// It could not be removed, and takes nothing in any more.
    closing: bool,
}

/// What one schedule is about.
pub struct Rig {
    pub setup: Setup,
    pub kernel: Arc<FakeKernel>,
    pub vm: Arc<Vm>,
    pub blocks: Vec<Arc<Block>>,
    /// No thread is rescheduled with one of these locked: they are the standard library's.
    windows: Mutex<Vec<Shown>>,
    bound: Mutex<BTreeMap<u64, usize>>,
    iommufd: File,
    /// Who changes bindings and who rebuilds the VM note what there is: as QEMU's big lock.
    bindings_change: shuttle::sync::Mutex<()>,
    ended: AtomicBool,
    minutes: AtomicU32,
}

/// Lets shuttle say who goes on.
pub fn step() {
    shuttle::thread::sleep(Duration::ZERO);
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

impl Rig {
    pub fn new(setup: Setup) -> Arc<Self> {
        let kind = match setup.vm {
            Backing::Split => VmKind::Confidential,
            Backing::InPlace => VmKind::InPlace,
            Backing::Ordinary => VmKind::Ordinary,
        };
        let kernel = Arc::new(FakeKernel::with_hook(kind, |call| {
            // Threads that only populate are none of shuttle's.
            if call == "madvise(MADV_POPULATE_WRITE)" {
                return;
            }
            step();
            tell(format_args!("{call}"));
        }));
        kernel.refuse_kcmp(!setup.kcmp);
        // One block more, and those that a VM has before it is made anew.
        kernel.set_pool(4 * (BLOCKS + 1));
        let iommufd = File::open("/dev/null").unwrap();
        for id in 0..IOASES {
            let iommufd = iommufd.as_fd();
            kernel
                .ioas_disable_huge_pages(Ioas { iommufd, id })
                .unwrap();
        }
        let vm = Vm::with_kernel(kernel.clone(), &iommufd).unwrap();
        let mut rig = Self {
            setup,
            kernel,
            vm,
            blocks: Vec::new(),
            windows: Mutex::default(),
            bound: Mutex::default(),
            iommufd,
            bindings_change: shuttle::sync::Mutex::new(()),
            ended: false.into(),
            minutes: 0.into(),
        };
        for number in 0..BLOCKS {
            let block = rig.new_block().unwrap();
            rig.blocks.push(block);
            rig.bind_home(number).unwrap();
            for ioas_id in 0..LASTING_IOASES {
                rig.add_window(number, ioas_id, 0..setup.pages).unwrap();
            }
        }
        rig.kernel.fail(setup.failures);
        Arc::new(rig)
    }

    pub fn new_block(&self) -> gmem_schedules::Result<Arc<Block>> {
        let setup = &self.setup;
        let config = match setup.vm {
            Backing::Ordinary => BlockConfig::new("ram", self.bytes()),
            _ => BlockConfig {
                dma_split: setup.split,
                release_delay: match setup.keeps {
                    true => Duration::from_millis(100),
                    false => Duration::ZERO,
                },
                keeps_private: setup.keeps,
                max_pending: 5 * setup.grain,
                hugetlb: setup.is_huge().then_some(HUGE),
                ..BlockConfig::confidential("ram", self.bytes(), setup.initial)
            },
        };
        Block::new(&self.vm, &config)
    }

    pub fn bytes(&self) -> u64 {
        self.setup.pages * self.setup.grain
    }

    pub fn home(&self, block: usize) -> u64 {
        HOME + block as u64 * self.bytes()
    }

    fn elsewhere(&self, block: usize) -> u64 {
        ELSEWHERE + (block as u64 * 0x100_0000)
    }

    fn iova(&self, block: usize, offset: u64) -> u64 {
        IOVAS + block as u64 * self.bytes() + offset
    }

    fn gpas(&self, gpa: u64) -> Span<Gpa> {
        Span::new(Gpa(gpa), self.bytes()).unwrap()
    }

    fn bind(&self, number: usize, gpa: u64) -> gmem_schedules::Result<()> {
        let block = &self.blocks[number];
        block.bind(0, self.bytes(), gpa)?.keep();
        let file = block.file(Attribute::Shared);
        self.kernel.add_slot(self.gpas(gpa), file, 0);
        locked(&self.bound).insert(gpa, number);
        Ok(())
    }

    fn bind_home(&self, number: usize) -> gmem_schedules::Result<()> {
        self.bind(number, self.home(number))
    }

    fn unbind(&self, number: usize, gpa: u64) -> gmem_schedules::Result<()> {
        self.kernel.remove_slot(self.gpas(gpa));
        let ended = self.blocks[number].unbind(0, self.bytes(), gpa);
        // It has ended all the same, unless there was none.
        locked(&self.bound).remove(&gpa);
        ended
    }

    /// Where a block is bound, if it is.
    fn address(&self, number: usize) -> Option<u64> {
        let bound = locked(&self.bound);
        let mut bound = bound.iter();
        bound.find(|(_, of)| **of == number).map(|(&gpa, _)| gpa)
    }

    fn add_slots(&self) {
        for (&gpa, &number) in locked(&self.bound).iter() {
            let file = self.blocks[number].file(Attribute::Shared);
            self.kernel.add_slot(self.gpas(gpa), file, 0);
        }
    }

    fn remove_slots(&self) {
        for &gpa in locked(&self.bound).keys() {
            self.kernel.remove_slot(self.gpas(gpa));
        }
    }

    fn window_config(
        &self,
        number: usize,
        ioas_id: u32,
        pages: std::ops::Range<u64>,
    ) -> WindowConfig {
        let offset = pages.start * self.setup.grain;
        WindowConfig {
            ioas_id,
            offset,
            length: (pages.end - pages.start) * self.setup.grain,
            iova: self.iova(number, offset),
            readonly: false,
        }
    }

    fn add_window(
        &self,
        number: usize,
        ioas_id: u32,
        pages: std::ops::Range<u64>,
    ) -> gmem_schedules::Result<Shown> {
        let config = self.window_config(number, ioas_id, pages);
        let shown = Shown {
            block: number,
            ioas_id,
            window: Arc::new(self.blocks[number].add_window(&self.iommufd, &config)?),
            closing: false,
        };
        locked(&self.windows).push(shown.clone());
        Ok(shown)
    }

    fn remove_window(&self, shown: &Shown) -> gmem_schedules::Result<()> {
        let removed = shown.window.remove();
        let mut windows = locked(&self.windows);
        let same = |other: &Shown| Arc::ptr_eq(&other.window, &shown.window);
        match &removed {
            Ok(()) => windows.retain(|other| !same(other)),
            // Somebody else has removed it.
            Err(error) if error.errno() == libc::EINVAL => {}
            Err(_) => {
                let left = windows.iter_mut().filter(|other| same(other));
                left.for_each(|left| left.closing = true);
            }
        }
        removed
    }

    /// A minute passes, and the VM's upkeep looks what is due.
    fn let_time_pass(&self) {
        let minutes = self.minutes.fetch_add(1, Ordering::SeqCst) + 1;
        self.vm.look_after(minutes * Duration::from_secs(60));
    }

    fn windows(&self) -> Vec<Shown> {
        locked(&self.windows).clone()
    }

    fn lasting(&self, number: usize, ioas_id: u32) -> Option<Shown> {
        let windows = locked(&self.windows);
        let mut mine = windows.iter();
        mine.find(|shown| shown.block == number && shown.ioas_id == ioas_id)
            .cloned()
    }
}
