// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM on a kernel that costs nothing, shared by the benchmarks.

use gmem::kernel::null::NullKernel;
use gmem::{Attribute, Block, BlockConfig, DmaSplit, Vm, Window, WindowConfig, PAGE_SIZE};
use std::sync::Arc;
use std::time::Duration;

/// One block, bound at its offsets and shown whole to devices, in areas that can be cut.
pub struct Rig {
    pub vm: Arc<Vm>,
    pub block: Arc<Block>,
    windows: Vec<Window>,
    #[allow(dead_code)]
    more: Vec<Arc<Block>>,
}

impl Rig {
    /// A block of `size_bytes`, all shared.
    pub fn new(size_bytes: u64) -> Self {
        Self::keeping(size_bytes, Duration::from_millis(100))
    }

    /// The same, with a delay after which memory is released that pages have left.
    pub fn keeping(size_bytes: u64, release_delay: Duration) -> Self {
        let mut rig = Self::without_devices(size_bytes, release_delay);
        rig.show();
        rig
    }

    /// Shows the block to the devices of one more IOAS.
    pub fn show(&mut self) {
        let file = null_file();
        let config = WindowConfig {
            ioas_id: 1 + self.windows.len() as u32,
            offset: 0,
            length: self.block.span().size_bytes(),
            iova: 0,
            readonly: false,
        };
        let window = self.block.add_window(&file, &config).expect("a window");
        self.windows.push(window);
    }

    /// One more block, bound behind all others.
    #[allow(dead_code)]
    pub fn add_block(&mut self) {
        const BYTES: u64 = 1 << 20;
        let config = BlockConfig::confidential("other", BYTES, Attribute::Shared);
        let block = Block::new(&self.vm, &config).expect("a block");
        let at = self.block.span().end() + self.more.len() as u64 * BYTES;
        block.bind(0, BYTES, at).expect("bound").keep();
        self.more.push(block);
    }

    /// The same, shown to nobody.
    pub fn without_devices(size_bytes: u64, release_delay: Duration) -> Self {
        let file = null_file();
        let vm = Vm::with_kernel(Arc::new(NullKernel), &file).expect("a VM");
        let config = BlockConfig {
            // The benchmark decides how far a block is fragmented.
            max_runs: Some(u64::MAX),
            max_request: Some(size_bytes),
            dma_split: DmaSplit::Cut,
            release_delay,
            keeps_private: true,
            ..BlockConfig::confidential("bench", size_bytes, Attribute::Shared)
        };
        let block = Block::new(&vm, &config).expect("a block");
        block.bind(0, size_bytes, 0).expect("bound").keep();
        Self {
            vm,
            block,
            windows: Vec::new(),
            more: Vec::new(),
        }
    }

    pub fn convert(&self, offset: u64, size_bytes: u64, attribute: Attribute) {
        self.vm
            .convert(offset, size_bytes, attribute)
            .expect("nothing refuses");
    }

    /// Makes `count` pages private, `stride_bytes` from one to the next: as many private runs, with
    /// a shared run between any two.
    pub fn fragment(&self, count: u64, stride_bytes: u64) {
        for index in 0..count {
            self.convert(index * stride_bytes, PAGE_SIZE, Attribute::Private);
        }
    }
}

fn null_file() -> std::fs::File {
    std::fs::File::open("/dev/null").expect("/dev/null is there")
}

/// Numbers without order and the same in every run (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % bound
    }
}
