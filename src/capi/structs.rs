// SPDX-License-Identifier: MIT OR Apache-2.0
//! The structures of the C ABI, and their way to the library's own types.
//!
//! Each starts with its size in bytes as the caller knows it. Structures only grow at the end: what
//! an older caller's lacks is zero, and what a newer caller's has beyond ours must be zero, so that
//! nothing that was asked for is ignored (the rule of openat2(2)). Hence zero is every field's default:
//! what is on unless somebody turns it off is a `no_…` here. Hence also no `bool` in what a caller
//! fills: a byte that is neither 0 nor 1 would be undefined behaviour before anybody could refuse it.
//!
//! A field without a comment is that of the same name in what its structure is for C.
#![allow(non_camel_case_types, missing_docs)]

use crate::attributes::Attribute;
use crate::block::{BackingChoice, Block, BlockConfig, ConvertUnit, Memslot};
use crate::dma::{DmaPath, DmaSplit, StrategyKind, WindowConfig};
use crate::error::{Error, Of, Result};
use crate::kernel::{NumaPolicy, PolicyMode, Probe};
use crate::plane::Backing;
use crate::stats::VmStats;
use crate::units::PAGE_SIZE;
use std::ffi::{c_char, c_int, c_void};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// [`BackingChoice::Auto`] for C.
pub const GMEM_BACKING_AUTO: u32 = 0;
/// [`Backing::InPlace`] for C.
pub const GMEM_BACKING_IN_PLACE: u32 = 1;
/// [`Backing::Split`] for C.
pub const GMEM_BACKING_SPLIT: u32 = 2;

/// [`Attribute::Shared`] for C.
pub const GMEM_SHARED: u32 = 0;
/// [`Attribute::Private`] for C.
pub const GMEM_PRIVATE: u32 = 1;

/// [`MemoryFault::Served`](crate::MemoryFault::Served) for C.
pub const GMEM_FAULT_SERVED: u32 = 0;
/// [`MemoryFault::Echo`](crate::MemoryFault::Echo) for C.
pub const GMEM_FAULT_ECHO: u32 = 1;
/// [`MemoryFault::Unexplained`](crate::MemoryFault::Unexplained) for C.
pub const GMEM_FAULT_UNEXPLAINED: u32 = 2;
/// [`MemoryFault::Later`](crate::MemoryFault::Later) for C.
pub const GMEM_FAULT_LATER: u32 = 3;
/// [`MemoryFault::Never`](crate::MemoryFault::Never) for C.
pub const GMEM_FAULT_NEVER: u32 = 4;

/// [`DmaPath::Auto`] for C.
pub const GMEM_DMA_AUTO: u32 = 0;
/// [`DmaPath::Fd`] for C.
pub const GMEM_DMA_FD: u32 = 1;
/// [`DmaPath::Address`] for C.
pub const GMEM_DMA_HVA: u32 = 2;

/// [`DmaSplit::Auto`] for C. The unit is gmem_block_config.dma_unit.
pub const GMEM_DMA_SPLIT_AUTO: u32 = 0;
/// [`DmaSplit::Cut`] for C.
pub const GMEM_DMA_SPLIT_CUT: u32 = 1;
/// [`DmaSplit::Unit`] for C. The unit is gmem_block_config.dma_unit.
pub const GMEM_DMA_SPLIT_UNIT: u32 = 2;
/// [`DmaSplit::Page`] for C.
pub const GMEM_DMA_SPLIT_PAGE: u32 = 3;

/// No strategy: the block has no DMA window.
///
/// Only in C: [`Block::strategy`] is an option.
pub const GMEM_STRATEGY_NONE: u32 = 0;
/// [`StrategyKind::Whole`] for C.
pub const GMEM_STRATEGY_WHOLE: u32 = 1;
/// [`StrategyKind::Page`] for C.
pub const GMEM_STRATEGY_PAGE: u32 = 2;
/// [`StrategyKind::Cut`] for C.
pub const GMEM_STRATEGY_CUT: u32 = 3;
/// [`StrategyKind::Unit`] for C. The unit is gmem_block_config.dma_unit.
pub const GMEM_STRATEGY_UNIT: u32 = 4;

/// `dma_unit` where GMEM_DMA_SPLIT_UNIT is asked for without one: a huge page of x86.
const DEFAULT_DMA_UNIT: u64 = 2 << 20;

/// `hugetlb_size` where none is given: what x86 has without asking.
const DEFAULT_HUGE_PAGE: u64 = 2 << 20;

/// Something failed that the VMM's user must know of.
///
/// Only in C: [`log::Level::Error`].
pub const GMEM_LOG_ERROR: u32 = 1;
/// Something is not as it should be.
///
/// Only in C: [`log::Level::Warn`].
pub const GMEM_LOG_WARN: u32 = 2;
/// What was chosen, and why.
///
/// Only in C: [`log::Level::Info`].
pub const GMEM_LOG_INFO: u32 = 3;
/// What was found.
///
/// Only in C: [`log::Level::Debug`].
pub const GMEM_LOG_DEBUG: u32 = 4;
/// Everything.
///
/// Only in C: [`log::Level::Trace`].
pub const GMEM_LOG_TRACE: u32 = 5;

/// [`ConvertUnit::Off`] for C. A value of gmem_block_config.convert_unit.
pub const GMEM_CONVERT_UNIT_OFF: u64 = u64::MAX;

/// Memory comes from wherever the thread that first needs it would get it.
///
/// Only in C: [`BlockConfig::policy`] is an option.
pub const GMEM_POLICY_DEFAULT: u32 = 0;
/// [`PolicyMode::Preferred`] for C.
pub const GMEM_POLICY_PREFERRED: u32 = 1;
/// [`PolicyMode::Bind`] for C.
pub const GMEM_POLICY_BIND: u32 = 2;
/// [`PolicyMode::Interleave`] for C.
pub const GMEM_POLICY_INTERLEAVE: u32 = 3;

/// [`Probe`] for C.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct gmem_probe {
    /// sizeof this structure.
    pub struct_size: usize,
    pub user_memory2: bool,
    pub guest_memfd: bool,
    pub guest_memfd_mmap: bool,
    pub guest_memfd_init_shared: bool,
    pub private_attribute: bool,
    pub in_place_conversion: bool,
    pub no_direct_map: bool,
    pub write_populate: bool,
    pub huge_page_sizes: u64,
}

/// [`BlockConfig`] for C.
///
/// All zero but for `struct_size` and `size`: an ordinary VM's memory, with the defaults.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct gmem_block_config {
    /// sizeof this structure.
    pub struct_size: usize,
    /// [`BlockConfig::name`] for C. NUL-terminated UTF-8, or NULL for "memory"; copied.
    pub name: *const c_char,
    pub size: u64,
    /// [`BlockConfig::backing`] for C. GMEM_BACKING_….
    pub backing: u32,
    /// [`BlockConfig::initial`] for C. GMEM_SHARED or GMEM_PRIVATE.
    pub initial: u32,
    pub confidential: u8,
    /// [`BlockConfig::reserve`] for C, turned round. 1: the first access takes it, and fails.
    pub no_reserve: u8,
    pub hugetlb: u8,
    /// [`BlockConfig::direct_map`] for C, turned round. 1: it is taken out.
    pub no_direct_map: u8,
    /// Bytes of a huge page of `hugetlb`: 2 MiB, 1 GiB, or 0 for 2 MiB. Only with that.
    ///
    /// Only in C: [`BlockConfig::hugetlb`] is an option with the size in it.
    pub hugetlb_size: u64,
    /// [`BlockConfig::dma`] for C. GMEM_DMA_….
    pub dma: u32,
    /// [`BlockConfig::dma_split`] for C. GMEM_DMA_SPLIT_….
    pub dma_split: u32,
    /// Bytes of the unit for GMEM_DMA_SPLIT_UNIT, and for GMEM_DMA_SPLIT_AUTO where cutting doesn't work: a
    /// power of two, at least 4096. 0: 2 MiB for the one, none for the other.
    ///
    /// Only in C: a [`DmaSplit`] has it with it.
    pub dma_unit: u64,
    /// [`BlockConfig::convert_unit`] for C. Bytes, a power of two; 0: 4096; or GMEM_CONVERT_UNIT_OFF.
    pub convert_unit: u64,
    pub max_runs: u64,
    /// [`BlockConfig::policy`] for C. GMEM_POLICY_….
    pub policy_mode: u32,
    /// Length of `policy_nodes`.
    ///
    /// Only in C: Rust's slices have theirs.
    pub policy_words: u32,
    /// Bit n % 64 of word n / 64: NUMA node n. Read during the call only.
    ///
    /// Only in C: a [`NumaPolicy`] has its nodes.
    pub policy_nodes: *const u64,
    /// [`BlockConfig::release_delay`] for C. In milliseconds; 0: 100; for none, set `release_at_once`.
    pub release_delay_ms: u32,
    /// 1: memory is released in the conversion, without delay.
    ///
    /// Only in C: in Rust this is a delay of zero.
    pub release_at_once: u8,
    pub keeps_private: u8,
    pub not_in_children: u8,
    pub not_in_core_dumps: u8,
    /// [`BlockConfig::max_pending`] for C. 0: 64 MiB.
    pub max_pending: u64,
    pub max_request: u64,
}

/// [`Memslot`] for C.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct gmem_memslot {
    /// sizeof this structure.
    pub struct_size: usize,
    pub userspace_addr: *mut c_void,
    /// [`Memslot::guest_memfd`] for C. Stays the library's: don't close it.
    pub guest_memfd: c_int,
    pub guest_memfd_offset: u64,
}

/// [`WindowConfig`] for C.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct gmem_window_config {
    /// sizeof this structure.
    pub struct_size: usize,
    /// /dev/iommu. Duplicated: the caller's own may be closed afterwards.
    ///
    /// Only in C: in Rust it is an argument.
    pub iommufd: c_int,
    pub ioas_id: u32,
    pub offset: u64,
    pub length: u64,
    pub iova: u64,
    pub readonly: u8,
}

/// [`VmStats`] for C.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct gmem_vm_stats {
    /// sizeof this structure.
    pub struct_size: usize,
    pub requests: u64,
    pub failures: u64,
    pub ignored_bytes: u64,
    pub convert_ns_total: u64,
    pub convert_ns_max: u64,
}

/// [`BlockStats`](crate::BlockStats) for C.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct gmem_block_stats {
    /// sizeof this structure.
    pub struct_size: usize,
    /// [`Block::backing`] for C. GMEM_BACKING_IN_PLACE or GMEM_BACKING_SPLIT.
    pub backing: u32,
    /// [`Block::strategy`] for C. GMEM_STRATEGY_….
    pub strategy: u32,
    /// [`Block::dma_path`] for C.
    pub dma_path: u32,
    pub size: u64,
    pub bytes_private: u64,
    pub bytes_shared: u64,
    pub bytes_dma_mapped: u64,
    pub bytes_quarantined: u64,
    pub runs: u64,
    pub bindings: u64,
    pub windows: u64,
    pub dma_areas: u64,
    pub to_private: u64,
    pub to_shared: u64,
    pub failures: u64,
    pub map_file_calls: u64,
    pub map_address_calls: u64,
    pub unmap_calls: u64,
    pub attribute_calls: u64,
    pub access_refused: u64,
    pub release_failures: u64,
    pub cut_calls: u64,
    pub set_calls: u64,
    pub remap_windows: u64,
    pub dma_areas_max: u64,
    pub retries: u64,
    pub huge_pages_shared: u64,
    pub bookkeeping_bytes: u64,
    pub quarantines: u64,
    pub huge_pages_whole: u64,
    pub huge_pages_split: u64,
    pub huge_page_splits: u64,
    pub huge_page_merges: u64,
    pub resumed: u64,
    pub runs_refused: u64,
    pub bytes_poisoned: u64,
    pub double_bytes: u64,
    pub releases_cancelled: u64,
    pub heals: u64,
    pub requests_refused: u64,
    pub max_runs: u64,
    pub max_request: u64,
    pub release_delay_ms: u64,
    pub max_pending: u64,
    pub windows_lost: u64,
}

/// [`Listener`](crate::Listener) for C. The files are those of gmem_block_shared_fd() and
/// gmem_block_private_fd(). Either function may be NULL.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct gmem_listener_ops {
    /// sizeof this structure.
    pub struct_size: usize,
    /// [`Listener::begin`](crate::Listener::begin) for C. The change is that of `size` bytes at
    /// `offset` to `attribute`. Returns 0, or a negative errno that refuses it.
    pub begin: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            offset: u64,
            size: u64,
            attribute: u32,
            sequence: u64,
        ) -> c_int,
    >,
    /// [`Listener::end`](crate::Listener::end) for C. `sequence` is that of `begin`, and grows from one
    /// conversion of the block to the next.
    pub end: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            offset: u64,
            size: u64,
            attribute: u32,
            changed: bool,
            sequence: u64,
        ),
    >,
}

/// A structure whose first field is its size.
///
/// # Safety
/// `repr(C)`, begins with a `usize`, and any bytes that a C caller leaves in it are valid for it,
/// zeroes included.
pub(super) unsafe trait HasSize: Copy {
    /// Bytes of the first version: nobody has less.
    const FIRST: usize = size_of::<Self>();
}

macro_rules! sized {
    ($($name:ident $(grown by $first_new:ident)?),*) => {
        $(
            // SAFETY: `repr(C)` with `struct_size` first; the rest are integers, pointers and nullable
            // functions, for which any bytes are valid, and bools in `gmem_probe`, which is only ever
            // written.
            unsafe impl HasSize for $name {
                $(const FIRST: usize = std::mem::offset_of!($name, $first_new);)?
            }
        )*
    };
}
sized!(
    // What follows the first version's fields begins in its padding.
    gmem_probe grown by huge_page_sizes,
    gmem_block_config grown by policy_mode,
    gmem_memslot,
    gmem_window_config,
    gmem_vm_stats,
    gmem_block_stats grown by cut_calls,
    gmem_listener_ops
);

fn name_of<T>() -> &'static str {
    std::any::type_name::<T>().rsplit("::").next().unwrap_or("")
}

/// How many bytes the caller and this library both know.
///
/// # Safety
/// `pointer` is NULL or points to at least a `usize`.
unsafe fn known_bytes<T: HasSize>(pointer: *const T) -> Result<usize> {
    let name = name_of::<T>();
    if pointer.is_null() {
        return Err(Error::invalid(format!("struct {name} is NULL")));
    }
    // SAFETY: not null, and every such structure begins with its size.
    let theirs = unsafe { pointer.cast::<usize>().read_unaligned() };
    if theirs < T::FIRST {
        return Err(Error::invalid(format!(
            "struct_size of struct {name} is {theirs}, less than the {} of its first version",
            T::FIRST
        )));
    }
    // A page, as for clone3(2): a size that is garbage must not make anyone read so far.
    if theirs > 4096 {
        return Err(Error::invalid(format!(
            "struct_size of struct {name} is {theirs}, more than any version has"
        )));
    }
    Ok(theirs.min(size_of::<T>()))
}

/// Copies a structure in. EINVAL if it has anything set that this version doesn't know.
///
/// # Safety
/// `pointer` is NULL or points to as many bytes as its first field says.
pub(super) unsafe fn read<T: HasSize>(pointer: *const T) -> Result<T> {
    // SAFETY: the caller's promise covers the first field.
    let bytes = unsafe { known_bytes(pointer)? };
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: the caller vouches for as many bytes as the first field says.
    let beyond = unsafe {
        let theirs = pointer.cast::<usize>().read_unaligned();
        std::slice::from_raw_parts(pointer.cast::<u8>().add(bytes), theirs - bytes)
    };
    if beyond.iter().any(|&byte| byte != 0) {
        return Err(Error::invalid(format!(
            "struct {} has something set that version {} doesn't know",
            name_of::<T>(),
            env!("CARGO_PKG_VERSION")
        )));
    }
    // SAFETY: both sides have `bytes` bytes, and zero is valid for what isn't copied.
    unsafe {
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), value.as_mut_ptr().cast(), bytes);
        Ok(value.assume_init())
    }
}

/// Copies a structure out, but for its size, which is the caller's.
///
/// # Safety
/// `pointer` is NULL or points to as many writable bytes as its first field says.
pub(super) unsafe fn fill<T: HasSize>(pointer: *mut T, value: T) -> Result<()> {
    // SAFETY: the caller's promise covers the first field.
    let bytes = unsafe { known_bytes(pointer)? };
    let head = size_of::<usize>();
    // SAFETY: both sides have `bytes` bytes, and at least a `usize`.
    unsafe {
        std::ptr::copy_nonoverlapping(
            (&raw const value).cast::<u8>().add(head),
            pointer.cast::<u8>().add(head),
            bytes - head,
        );
    }
    Ok(())
}

pub(super) fn attribute_of(number: u32) -> Result<Attribute> {
    match number {
        GMEM_SHARED => Ok(Attribute::Shared),
        GMEM_PRIVATE => Ok(Attribute::Private),
        other => Err(Error::invalid(format!("{other} is no attribute"))),
    }
}

pub(super) fn attribute_number(attribute: Attribute) -> u32 {
    match attribute {
        Attribute::Shared => GMEM_SHARED,
        Attribute::Private => GMEM_PRIVATE,
    }
}

/// What a byte of a structure says that is yes or no.
fn switch(what: &str, number: u8) -> Result<bool> {
    match number {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Error::invalid(format!(
            "{what} is {other}, neither 0 nor 1"
        ))),
    }
}

impl gmem_block_config {
    /// The library's own configuration, or what is wrong with this one.
    pub(super) fn check(&self, name: &str, nodes: &[u64]) -> Result<BlockConfig> {
        self.check_all(name, nodes).of(name)
    }

    fn check_all(&self, name: &str, nodes: &[u64]) -> Result<BlockConfig> {
        let unknown = |what: &str, number: u32| {
            Error::invalid(format!("{number} is no known value of {what}"))
        };
        let hugetlb = switch("hugetlb", self.hugetlb)?;
        if !hugetlb && self.hugetlb_size != 0 {
            return Err(Error::invalid("hugetlbsize says nothing without hugetlb"));
        }
        let default = BlockConfig::new(name, self.size);
        let at_once = switch("release_at_once", self.release_at_once)?;
        if at_once && self.release_delay_ms != 0 {
            return Err(Error::invalid(format!(
                "release_delay_ms is {}, and release_at_once says that there is no delay",
                self.release_delay_ms
            )));
        }
        Ok(BlockConfig {
            name: name.to_string(),
            size: self.size,
            backing: match self.backing {
                GMEM_BACKING_AUTO => BackingChoice::Auto,
                GMEM_BACKING_IN_PLACE => BackingChoice::Only(Backing::InPlace),
                GMEM_BACKING_SPLIT => BackingChoice::Only(Backing::Split),
                other => return Err(unknown("backing", other)),
            },
            confidential: switch("confidential", self.confidential)?,
            initial: attribute_of(self.initial).map_err(|_| unknown("initial", self.initial))?,
            reserve: !switch("no_reserve", self.no_reserve)?,
            policy: self.check_policy(nodes)?,
            hugetlb: hugetlb.then_some(match self.hugetlb_size {
                0 => DEFAULT_HUGE_PAGE,
                bytes => bytes,
            }),
            dma: match self.dma {
                GMEM_DMA_AUTO => DmaPath::Auto,
                GMEM_DMA_FD => DmaPath::Fd,
                GMEM_DMA_HVA => DmaPath::Address,
                other => return Err(unknown("dma", other)),
            },
            dma_split: self.check_dma_split()?,
            convert_unit: match self.convert_unit {
                0 => ConvertUnit::Bytes(PAGE_SIZE),
                GMEM_CONVERT_UNIT_OFF => ConvertUnit::Off,
                bytes => ConvertUnit::Bytes(bytes),
            },
            max_runs: (self.max_runs != 0).then_some(self.max_runs),
            max_request: (self.max_request != 0).then_some(self.max_request),
            direct_map: !switch("no_direct_map", self.no_direct_map)?,
            release_delay: match self.release_delay_ms {
                _ if at_once => Duration::ZERO,
                0 => default.release_delay,
                ms => Duration::from_millis(ms.into()),
            },
            max_pending: match self.max_pending {
                0 => default.max_pending,
                bytes => bytes,
            },
            keeps_private: switch("keeps_private", self.keeps_private)?,
            not_in_children: switch("not_in_children", self.not_in_children)?,
            not_in_core_dumps: switch("not_in_core_dumps", self.not_in_core_dumps)?,
        })
    }
}

impl gmem_block_config {
    /// The words that `policy_nodes` points to.
    ///
    /// # Safety
    /// It points to as many as `policy_words` says.
    pub(super) unsafe fn policy_nodes(&self) -> Result<Vec<u64>> {
        let words = self.policy_words as usize;
        // No kernel has more than 1024 nodes (MAX_NUMNODES): a number that is garbage must not make
        // anyone read so far.
        if words > 1024 / 64 {
            return Err(Error::invalid(format!(
                "policy_words is {words}, more than any kernel has nodes for"
            )));
        }
        if words == 0 {
            return Ok(Vec::new());
        }
        if self.policy_nodes.is_null() {
            return Err(Error::invalid(format!(
                "policy_nodes is NULL and policy_words {words}"
            )));
        }
        // SAFETY: not null, and the caller vouches for so many words.
        Ok(unsafe { std::slice::from_raw_parts(self.policy_nodes, words) }.to_vec())
    }

    fn check_policy(&self, nodes: &[u64]) -> Result<Option<NumaPolicy>> {
        let mode = match self.policy_mode {
            GMEM_POLICY_DEFAULT if nodes.iter().all(|&word| word == 0) => return Ok(None),
            GMEM_POLICY_DEFAULT => {
                return Err(Error::invalid(
                    "host-nodes says nothing with policy=default",
                ))
            }
            GMEM_POLICY_PREFERRED => PolicyMode::Preferred,
            GMEM_POLICY_BIND => PolicyMode::Bind,
            GMEM_POLICY_INTERLEAVE => PolicyMode::Interleave,
            other => {
                return Err(Error::invalid(format!(
                    "{other} is no known value of policy"
                )))
            }
        };
        let policy = NumaPolicy::new(mode, nodes);
        policy
            .map(Some)
            .ok_or_else(|| Error::invalid("a policy other than default needs host-nodes"))
    }

    fn check_dma_split(&self) -> Result<DmaSplit> {
        let unit = (self.dma_unit != 0).then_some(self.dma_unit);
        let named = match self.dma_split {
            GMEM_DMA_SPLIT_AUTO => return Ok(DmaSplit::Auto { unit }),
            GMEM_DMA_SPLIT_UNIT => return Ok(DmaSplit::Unit(unit.unwrap_or(DEFAULT_DMA_UNIT))),
            GMEM_DMA_SPLIT_CUT => DmaSplit::Cut,
            GMEM_DMA_SPLIT_PAGE => DmaSplit::Page,
            other => {
                return Err(Error::invalid(format!(
                    "{other} is no known value of dma-split"
                )))
            }
        };
        match unit {
            None => Ok(named),
            Some(_) => Err(Error::invalid(
                "dma-unit is for dma-split=unit, and for auto as what to do where cut doesn't work",
            )),
        }
    }
}

impl gmem_window_config {
    /// The library's own configuration, or what is wrong with this one.
    pub(super) fn check(&self) -> Result<WindowConfig> {
        Ok(WindowConfig {
            ioas_id: self.ioas_id,
            offset: self.offset,
            length: self.length,
            iova: self.iova,
            readonly: switch("readonly", self.readonly)?,
        })
    }
}

impl From<Probe> for gmem_probe {
    fn from(probe: Probe) -> Self {
        Self {
            struct_size: size_of::<Self>(),
            user_memory2: probe.user_memory2,
            guest_memfd: probe.guest_memfd,
            guest_memfd_mmap: probe.guest_memfd_mmap,
            guest_memfd_init_shared: probe.guest_memfd_init_shared,
            private_attribute: probe.private_attribute,
            in_place_conversion: probe.in_place_conversion,
            no_direct_map: probe.no_direct_map,
            write_populate: probe.write_populate,
            huge_page_sizes: probe.huge_page_sizes,
        }
    }
}

impl From<Memslot<'_>> for gmem_memslot {
    fn from(slot: Memslot<'_>) -> Self {
        Self {
            struct_size: size_of::<Self>(),
            userspace_addr: slot.userspace_addr.cast(),
            guest_memfd: slot.guest_memfd.as_raw_fd(),
            guest_memfd_offset: slot.guest_memfd_offset,
        }
    }
}

impl From<VmStats> for gmem_vm_stats {
    fn from(stats: VmStats) -> Self {
        Self {
            struct_size: size_of::<Self>(),
            requests: stats.requests,
            failures: stats.failures,
            ignored_bytes: stats.ignored_bytes,
            convert_ns_total: stats.convert_ns_total,
            convert_ns_max: stats.convert_ns_max,
        }
    }
}

impl gmem_block_stats {
    pub(super) fn of(block: &Block) -> Self {
        let stats = block.stats();
        Self {
            struct_size: size_of::<Self>(),
            backing: match block.backing() {
                Backing::InPlace => GMEM_BACKING_IN_PLACE,
                Backing::Split => GMEM_BACKING_SPLIT,
            },
            strategy: match block.strategy() {
                None => GMEM_STRATEGY_NONE,
                Some(StrategyKind::Whole) => GMEM_STRATEGY_WHOLE,
                Some(StrategyKind::Page) => GMEM_STRATEGY_PAGE,
                Some(StrategyKind::Cut) => GMEM_STRATEGY_CUT,
                Some(StrategyKind::Unit(_)) => GMEM_STRATEGY_UNIT,
            },
            dma_path: match block.dma_path() {
                _ if stats.windows == 0 => GMEM_DMA_AUTO,
                DmaPath::Auto => GMEM_DMA_AUTO,
                DmaPath::Fd => GMEM_DMA_FD,
                DmaPath::Address => GMEM_DMA_HVA,
            },
            size: stats.size,
            bytes_private: stats.bytes_private,
            bytes_shared: stats.bytes_shared,
            bytes_dma_mapped: stats.bytes_dma_mapped,
            bytes_quarantined: stats.bytes_quarantined,
            runs: stats.runs,
            bindings: stats.bindings,
            windows: stats.windows,
            dma_areas: stats.dma_areas,
            to_private: stats.to_private,
            to_shared: stats.to_shared,
            failures: stats.failures,
            map_file_calls: stats.map_file_calls,
            map_address_calls: stats.map_address_calls,
            unmap_calls: stats.unmap_calls,
            attribute_calls: stats.attribute_calls,
            access_refused: stats.access_refused,
            release_failures: stats.release_failures,
            cut_calls: stats.cut_calls,
            set_calls: stats.set_calls,
            remap_windows: stats.remap_windows,
            dma_areas_max: stats.dma_areas_max,
            retries: stats.retries,
            huge_pages_shared: stats.huge_pages_shared,
            bookkeeping_bytes: stats.bookkeeping_bytes,
            quarantines: stats.quarantines,
            huge_pages_whole: stats.huge_pages_whole,
            huge_pages_split: stats.huge_pages_split,
            huge_page_splits: stats.huge_page_splits,
            huge_page_merges: stats.huge_page_merges,
            resumed: stats.resumed,
            runs_refused: stats.runs_refused,
            bytes_poisoned: stats.bytes_poisoned,
            double_bytes: stats.double_bytes,
            releases_cancelled: stats.releases_cancelled,
            heals: stats.heals,
            requests_refused: stats.requests_refused,
            max_runs: stats.max_runs,
            max_request: stats.max_request,
            release_delay_ms: stats.release_delay_ms,
            max_pending: stats.max_pending,
            windows_lost: stats.windows_lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What C gets from `= { 0 }` and a size: nothing in the header has another default than zero.
    #[test]
    fn a_structure_of_zeros_is_the_librarys_default() {
        // SAFETY: zero is valid for all fields, as `HasSize` says.
        let mut config: gmem_block_config = unsafe { std::mem::zeroed() };
        config.size = 1 << 20;
        let checked = config.check("ram7", &[]).unwrap();
        let default = BlockConfig::new("ram7", 1 << 20);
        assert_eq!(format!("{checked:?}"), format!("{default:?}"));
    }
}
