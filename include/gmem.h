/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * gmem: owns a guest's memory on KVM guest_memfd.
 *
 * Generated from src/capi.rs and src/capi/, and from the docs of the Rust items that these name: change it
 * there. What is said of Rust and C alike is written in Rust.
 *
 * Every structure starts with its own size in bytes, set by the caller; unset fields must be zero,
 * which is the default of each. A function returns 0 or a negative errno unless its comment says
 * otherwise, and leaves a sentence for gmem_last_error() when it fails. Comments have the errnos that
 * tell a caller something; -EIO may also be a bug in the library.
 *
 * Handles are opaque and checked: one that is NULL, ended, or of another kind is -EINVAL. So is
 * a NULL for what is to be read or written, and a struct_size of no version. Ending NULL is fine.
 *
 * Any thread may make any call, also in exit handlers. None is async-signal-safe: no call may be
 * made in a signal handler, which may have interrupted one. Only in that of a fault (SIGBUS) which
 * its thread has raised itself by touching a block's memory, outside of the library, may it ask
 * gmem_block_get_run().
 *
 * The library makes threads of its own: one for a VM (gmem-upkeep), from its first DMA window,
 * quarantine, or split block that keeps memory (gmem_block_config.release_delay_ms) on; one for
 * each block with a NUMA policy (gmem_block_config.policy_mode); and those of a preallocation
 * (gmem_block_preallocate()), until that is done. All of them block all signals but those that a
 * fault of their own raises.
 *
 * A child of fork(2) may call nothing here if its parent has several threads, and with any of those
 * it has: what another thread had locked stays locked in the child, and a call may never return.
 * Ending and executing a program need no call; the library has no handlers for either. Until then a
 * child has its parent's VM, whose ioctls the kernel serves for the parent only.
 *
 * The words:
 *
 *   block        one backend instance: offsets 0..size
 *   attribute    private or shared, per page
 *   plane        where bytes live. In-place: one guest_memfd holds both kinds. Split: a
 *                guest_memfd for private pages, a memfd for shared ones
 *   binding      where a block's offsets appear in guest physical address space
 *   conversion   a change of attribute over a range, to private or to shared
 *   DMA window   one IOAS and the range of IOVAs in it that shows part of a block
 *   run          pages of one attribute, one next to the other
 *   range        pages that a call has locked against others, with all that can't change without
 *                them (a huge page, a unit of DMA)
 *   area         one mapping of the kernel in an IOAS; it is unmapped whole, or cut
 *   listener     anyone who must let go of a range before it changes
 *   detached     a VM between gmem_vm_detach() and gmem_vm_attach(); at its end it is after
 *                gmem_vm_end()
 *   quarantined  kept from devices although shared, or perhaps still with them although private,
 *                since undoing a change failed; until it is healed
 *   poisoned     without its memory, which the host's hardware has lost, until a reset gives it
 *                fresh one
 */

#ifndef GMEM_H
#define GMEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * The best backing that the VM and its kernel allow.
 */
#define GMEM_BACKING_AUTO 0

/**
 * One guest_memfd for all bytes, private and shared. In an ordinary VM every page of it is shared
 * for good; else the kernel must be able to convert pages where they are.
 */
#define GMEM_BACKING_IN_PLACE 1

/**
 * A memfd for the bytes of shared pages, a guest_memfd for those of private ones.
 */
#define GMEM_BACKING_SPLIT 2

/**
 * Host and devices may reach the page.
 */
#define GMEM_SHARED 0

/**
 * Nobody but the guest may reach the page.
 */
#define GMEM_PRIVATE 1

/**
 * The pages have the attribute that the access needs now: run the vCPU again.
 */
#define GMEM_FAULT_SERVED 0

/**
 * A conversion came by while the vCPU ran, so that the fault may mean nothing: run the vCPU again.
 * What was meant comes again.
 */
#define GMEM_FAULT_ECHO 1

/**
 * Nothing here explains it: the pages have the attribute, or an access doesn't convert. Run the
 * vCPU again; if that goes on, KVM can't serve the access, and nobody else will.
 */
#define GMEM_FAULT_UNEXPLAINED 2

/**
 * What it takes is not to be had at this moment; it may be later. Let the vCPU wait, and run it
 * again.
 */
#define GMEM_FAULT_LATER 3

/**
 * No later moment will do: the vCPU can't go on.
 */
#define GMEM_FAULT_NEVER 4

/**
 * By file and offset where the kernel takes the file, else by address.
 */
#define GMEM_DMA_AUTO 0

/**
 * By file and offset only (IOMMU_IOAS_MAP_FILE).
 */
#define GMEM_DMA_FD 1

/**
 * By address only (IOMMU_IOAS_MAP).
 */
#define GMEM_DMA_HVA 2

/**
 * Cut where that works; else by a unit if one is given, else page by page. The unit is
 * gmem_block_config.dma_unit.
 */
#define GMEM_DMA_SPLIT_AUTO 0

/**
 * Map large, unmap any part. Needs an IOAS that was prepared (gmem_ioas_prepare()).
 */
#define GMEM_DMA_SPLIT_CUT 1

/**
 * Map in areas of a unit at most: a power of two, at least a page. When a part of one becomes
 * private, all of it is unmapped and the rest mapped again: devices that touch the rest meanwhile
 * fault. The unit is gmem_block_config.dma_unit.
 */
#define GMEM_DMA_SPLIT_UNIT 2

/**
 * Map page by page.
 */
#define GMEM_DMA_SPLIT_PAGE 3

/**
 * No strategy: the block has no DMA window.
 */
#define GMEM_STRATEGY_NONE 0

/**
 * Areas of 1 GiB at most: nothing in them ever becomes private.
 */
#define GMEM_STRATEGY_WHOLE 1

/**
 * One area per 4 KiB page: any page can leave by itself, at a map call for each.
 */
#define GMEM_STRATEGY_PAGE 2

/**
 * One area per converted range, and any part of it can leave by itself. Needs an IOAS that was
 * prepared (gmem_ioas_prepare()).
 */
#define GMEM_STRATEGY_CUT 3

/**
 * Areas of a unit at most, with large IOMMU entries. For a part to leave, all of its area leaves,
 * and the rest comes back: devices that touch the rest meanwhile fault. The unit is
 * gmem_block_config.dma_unit.
 */
#define GMEM_STRATEGY_UNIT 4

/**
 * Something failed that the VMM's user must know of.
 */
#define GMEM_LOG_ERROR 1

/**
 * Something is not as it should be.
 */
#define GMEM_LOG_WARN 2

/**
 * What was chosen, and why.
 */
#define GMEM_LOG_INFO 3

/**
 * What was found.
 */
#define GMEM_LOG_DEBUG 4

/**
 * Everything.
 */
#define GMEM_LOG_TRACE 5

/**
 * Nothing in the block ever changes its attribute, but for a reset. A value of
 * gmem_block_config.convert_unit.
 */
#define GMEM_CONVERT_UNIT_OFF UINT64_MAX

/**
 * Memory comes from wherever the thread that first needs it would get it.
 */
#define GMEM_POLICY_DEFAULT 0

/**
 * The first of the given nodes while it has memory, then any (MPOL_PREFERRED).
 */
#define GMEM_POLICY_PREFERRED 1

/**
 * The given nodes or none (MPOL_BIND).
 */
#define GMEM_POLICY_BIND 2

/**
 * The given nodes in turn, page by page (MPOL_INTERLEAVE).
 */
#define GMEM_POLICY_INTERLEAVE 3

/**
 * Guest memory of one size, on files of its own, bound to any number of guest physical addresses.
 */
struct gmem_block;

/**
 * One registration of a listener.
 */
struct gmem_listener;

/**
 * A VM whose memory is in blocks of this library.
 */
struct gmem_vm;

/**
 * One IOAS and the range of IOVAs in it that shows part of a block.
 */
struct gmem_window;

/**
 * Receives one message: a level (GMEM_LOG_…) and a NUL-terminated line without a newline. It may be
 * called on any thread, with locks of the library held, and must not call the library.
 */
typedef void (*gmem_log_fn)(void *opaque, uint32_t level, const char *message);

/**
 * What the kernel can do for a VM. Answers depend on the VM's type, so the VM is asked and not
 * /dev/kvm.
 */
struct gmem_probe {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * KVM_SET_USER_MEMORY_REGION2.
   */
  bool user_memory2;
  /**
   * KVM_CREATE_GUEST_MEMFD.
   */
  bool guest_memfd;
  /**
   * A guest_memfd can be mapped (Linux 6.18).
   */
  bool guest_memfd_mmap;
  /**
   * A guest_memfd's pages can start shared (Linux 6.18, not for confidential VM types).
   */
  bool guest_memfd_init_shared;
  /**
   * The VM keeps a private attribute per page, set by KVM_SET_MEMORY_ATTRIBUTES (to Linux 7.3).
   */
  bool private_attribute;
  /**
   * The VM's guest_memfds keep a private attribute per page, set by KVM_SET_MEMORY_ATTRIBUTES2, and
   * pages are converted in place. Then the VM keeps none. A VM can have private memory if it has
   * this or `private_attribute`.
   */
  bool in_place_conversion;
  /**
   * A guest_memfd's memory can be out of the kernel's direct map. Experimental.
   */
  bool no_direct_map;
  /**
   * A guest_memfd can be filled by write(2).
   */
  bool write_populate;
  /**
   * Of pages of how many bytes a guest_memfd can be, other than 4096, ORed: 2 MiB, 1 GiB; 0: none.
   * The host's pool of them may be empty.
   */
  uint64_t huge_page_sizes;
};

/**
 * The numbers of one VM, since it was opened.
 */
struct gmem_vm_stats {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * Conversion requests of the guest, senseless ones included.
   */
  uint64_t requests;
  /**
   * Those that got an error.
   */
  uint64_t failures;
  /**
   * Bytes of requests to share what is no memory of a block, which were ignored.
   */
  uint64_t ignored_bytes;
  /**
   * Nanoseconds in all requests together.
   */
  uint64_t convert_ns_total;
  /**
   * Nanoseconds of the longest request.
   */
  uint64_t convert_ns_max;
};

/**
 * What a block is to be like.
 *
 * All zero but for `struct_size` and `size`: an ordinary VM's memory, with the defaults.
 */
struct gmem_block_config {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * What messages call it, with a question mark for each control character. NUL-terminated UTF-8,
   * or NULL for "memory"; copied.
   */
  const char *name;
  /**
   * Bytes of guest memory, a multiple of 4096.
   */
  uint64_t size;
  /**
   * How its private and its shared bytes are kept. GMEM_BACKING_….
   */
  uint32_t backing;
  /**
   * Every page's attribute at first, and after gmem_block_reset(). GMEM_SHARED or GMEM_PRIVATE.
   */
  uint32_t initial;
  /**
   * 1: pages may be private at all.
   */
  uint8_t confidential;
  /**
   * 0: a conversion to shared fails if there is no memory for it, instead of the first access.
   * Costs the memory at once. 1: the first access takes it, and fails.
   */
  uint8_t no_reserve;
  /**
   * 1: memory from the host's pool of huge pages. Conversions stay as fine as `convert_unit`. In a
   * split block it is the shared memory; a huge page is the host's again when its last page has
   * become private, and without reserved memory (`no_reserve`) who touches one gets SIGBUS if the
   * pool is empty. In place it is all memory, set aside at once, where gmem_probe.huge_page_sizes
   * has the size, and the kernel splits a huge page while any of its pages is shared.
   */
  uint8_t hugetlb;
  /**
   * 0: the kernel keeps the memory in its own address space (its direct map). To take it out is
   * experimental, and works only where gmem_probe.no_direct_map says so: nothing can pin such
   * memory, so that DMA windows are refused. 1: it is taken out.
   */
  uint8_t no_direct_map;
  /**
   * Bytes of a huge page of `hugetlb`: 2 MiB, 1 GiB, or 0 for 2 MiB. Only with that.
   */
  uint64_t hugetlb_size;
  /**
   * How devices' mappings name memory. GMEM_DMA_….
   */
  uint32_t dma;
  /**
   * How windows of a confidential block are mapped. GMEM_DMA_SPLIT_….
   */
  uint32_t dma_split;
  /**
   * Bytes of the unit for GMEM_DMA_SPLIT_UNIT, and for GMEM_DMA_SPLIT_AUTO where cutting doesn't
   * work: a power of two, at least 4096. 0: 2 MiB for the one, none for the other.
   */
  uint64_t dma_unit;
  /**
   * The smallest range that the guest may convert. Bytes, a power of two; 0: 4096; or
   * GMEM_CONVERT_UNIT_OFF.
   */
  uint64_t convert_unit;
  /**
   * Most private runs that the guest may make. 0: in a split block as many as it likes, since
   * neither the books here (a bit a page at worst) nor KVM's attributes (an entry a page) grow
   * beyond what the block's size sets; in place 1400, which bounds what a guest can make the
   * library and the kernel remember. No bound protects a kernel that fails to free its record of
   * the runs: see gmem_vm_end().
   */
  uint64_t max_runs;
  /**
   * From which NUMA nodes memory of both planes comes. 0: from wherever the thread that first needs
   * it would get it. Private memory can only be placed when the library allocates it, so under a
   * policy it is there from the start, or from the conversion on. GMEM_POLICY_….
   */
  uint32_t policy_mode;
  /**
   * Length of `policy_nodes`.
   */
  uint32_t policy_words;
  /**
   * Bit n % 64 of word n / 64: NUMA node n. Read during the call only.
   */
  const uint64_t *policy_nodes;
  /**
   * How long the memory that a page of a split block leaves is kept before it is the host's again,
   * so that a page which comes back meanwhile finds it: then nothing is freed, allocated or
   * cleared. What it finds is what it left: its old shared bytes, or its old private ones (only
   * with `keeps_private`). Memory is released after one to two delays, or, where nothing was kept
   * for a while, a second later; before that when memory is short, by gmem_block_reset() and
   * gmem_block_release_pending(), and when the block ends. What is kept of shared memory stays
   * visible to who has the file or its mapping: host, vhost and vhost-user back ends; devices that
   * are passed through and the guest don't reach it. In milliseconds; 0: 100; for none, set
   * `release_at_once`.
   */
  uint32_t release_delay_ms;
  /**
   * 1: memory is released in the conversion, without delay.
   */
  uint8_t release_at_once;
  /**
   * 1: private memory may be kept, too, so that a page which is shared for a moment finds its old
   * private bytes: only for VM types of which it is known that the guest's page may outlive the
   * conversion. So on KVM_X86_SW_PROTECTED_VM. On TDX and SNP the state of a page (S-EPT, RMP) is
   * tied to its memory, and nobody has shown that it may.
   */
  uint8_t keeps_private;
  /**
   * 1: children that the process forks have no mapping of the memory (MADV_DONTFORK): one that
   * touches an address gets SIGSEGV. Without it they have the same memory at the same addresses.
   */
  uint8_t not_in_children;
  /**
   * 1: core dumps leave the memory out (MADV_DONTDUMP).
   */
  uint8_t not_in_core_dumps;
  /**
   * Most bytes that are kept for `release_delay_ms`, in both planes: what comes on top is released
   * in its conversion. 0: 64 MiB.
   */
  uint64_t max_pending;
  /**
   * Most bytes that one request of the guest may change, from the first page of a block that
   * changes to the last, and in all blocks that it is about together: the smallest bound of those
   * decides, and more is refused with ENOSPC. The kernel goes through all that lies between, too.
   * It bounds how long a request takes, what the library needs for it, and what it has in both
   * planes at once. A reset is not bound by it. 0: 1 GiB, or the `convert_unit` if that is more.
   * Real guests stay below: page state changes of SNP come to 253 huge pages of 2 MiB at most, and
   * TDX's MapGPA in requests of 2 MiB.
   */
  uint64_t max_request;
};

/**
 * What KVM_SET_USER_MEMORY_REGION2 needs to know for a memory slot in address space 0.
 *
 * Other address spaces (x86's SMM) get a plain slot at the same address, without a guest_memfd: KVM
 * refuses to bind an offset twice, and takes the pages from the mapping just as well.
 */
struct gmem_memslot {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * Its `userspace_addr`.
   */
  void *userspace_addr;
  /**
   * Its `guest_memfd`. Stays the library's: don't close it.
   */
  int guest_memfd;
  /**
   * Its `guest_memfd_offset`, in bytes.
   */
  uint64_t guest_memfd_offset;
};

/**
 * The numbers of one block: its state now, and counts since it was created.
 */
struct gmem_block_stats {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * How its halves are kept. GMEM_BACKING_IN_PLACE or GMEM_BACKING_SPLIT.
   */
  uint32_t backing;
  /**
   * How its windows are mapped, if it has any. They can differ when their IOASes do, and this is
   * the oldest one's. GMEM_STRATEGY_….
   */
  uint32_t strategy;
  /**
   * How its windows name memory; GMEM_DMA_AUTO while none has found out.
   */
  uint32_t dma_path;
  /**
   * Size in bytes.
   */
  uint64_t size;
  /**
   * Bytes that are private now.
   */
  uint64_t bytes_private;
  /**
   * Bytes that are shared now; with the private ones they make up the size.
   */
  uint64_t bytes_shared;
  /**
   * Bytes that a device can reach now; a byte that two windows show counts twice.
   */
  uint64_t bytes_dma_mapped;
  /**
   * Bytes that no device may reach after an undo that failed; of an ordinary VM's block, that some
   * window lacks.
   */
  uint64_t bytes_quarantined;
  /**
   * Private runs now.
   */
  uint64_t runs;
  /**
   * Bindings now.
   */
  uint64_t bindings;
  /**
   * DMA windows now.
   */
  uint64_t windows;
  /**
   * Kernel areas of all windows now.
   */
  uint64_t dma_areas;
  /**
   * Conversions to private that changed a page here.
   */
  uint64_t to_private;
  /**
   * Conversions to shared that changed a page here.
   */
  uint64_t to_shared;
  /**
   * Conversions of a range of this block that got an error.
   */
  uint64_t failures;
  /**
   * Mappings of the block that IOMMU_IOAS_MAP_FILE made: not those that it refused, nor what is
   * tried on pages of no meaning.
   */
  uint64_t map_file_calls;
  /**
   * Mappings of the block that IOMMU_IOAS_MAP made.
   */
  uint64_t map_address_calls;
  /**
   * IOMMU_IOAS_UNMAP calls.
   */
  uint64_t unmap_calls;
  /**
   * KVM_SET_MEMORY_ATTRIBUTES calls.
   */
  uint64_t attribute_calls;
  /**
   * Accesses of the VMM to private pages that gmem_block_check_access() refused.
   */
  uint64_t access_refused;
  /**
   * Times that memory of the other plane could not be freed after a conversion: double memory until
   * the page converts again.
   */
  uint64_t release_failures;
  /**
   * VFIO_IOMMU_UNMAP_DMA calls: unmaps that may cut areas.
   */
  uint64_t cut_calls;
  /**
   * IOMMU_VFIO_IOAS SET calls, which those need.
   */
  uint64_t set_calls;
  /**
   * Times that pages which stayed shared were out of a window for a moment.
   */
  uint64_t remap_windows;
  /**
   * Most kernel areas that all windows together ever had.
   */
  uint64_t dma_areas_max;
  /**
   * Times that the kernel said EAGAIN and was asked again.
   */
  uint64_t retries;
  /**
   * Huge pages that hold shared memory now; hugetlb only.
   */
  uint64_t huge_pages_shared;
  /**
   * Memory of the library, in bytes, that grows with fragmentation.
   */
  uint64_t bookkeeping_bytes;
  /**
   * Times that a range was quarantined.
   */
  uint64_t quarantines;
  /**
   * Huge pages that are one page now; in-place with hugetlb only.
   */
  uint64_t huge_pages_whole;
  /**
   * Huge pages that the kernel has split now, since some of their pages are shared; in-place with
   * hugetlb only.
   */
  uint64_t huge_pages_split;
  /**
   * Times that a conversion had a huge page split.
   */
  uint64_t huge_page_splits;
  /**
   * Times that a conversion made a huge page one page again.
   */
  uint64_t huge_page_merges;
  /**
   * Times that a conversion went on where the kernel had stopped half-way.
   */
  uint64_t resumed;
  /**
   * Requests that gmem_block_config.max_runs forbade.
   */
  uint64_t runs_refused;
  /**
   * Bytes of memory that the host has lost (gmem_block_poison()), in either plane.
   */
  uint64_t bytes_poisoned;
  /**
   * Bytes of memory that pages have left and that are not released yet, in both planes: at most so
   * much is held twice for it. See gmem_block_config.release_delay_ms.
   */
  uint64_t double_bytes;
  /**
   * Times that a conversion got back what was not released yet.
   */
  uint64_t releases_cancelled;
  /**
   * Times that quarantined pages were put right without a conversion.
   */
  uint64_t heals;
  /**
   * Requests that gmem_block_config.max_request forbade.
   */
  uint64_t requests_refused;
  /**
   * The bound gmem_block_config.max_runs as it holds, given or by default. 0: any number. In a
   * block that is not confidential this and the next three are 0.
   */
  uint64_t max_runs;
  /**
   * The bound gmem_block_config.max_request as it holds.
   */
  uint64_t max_request;
  /**
   * Whole milliseconds of gmem_block_config.release_delay_ms as it holds, so that less than one is
   * 0. Also 0 in place, where no page leaves memory.
   */
  uint64_t release_delay_ms;
  /**
   * The bound gmem_block_config.max_pending as it holds. 0: nothing is kept.
   */
  uint64_t max_pending;
  /**
   * DMA windows that ended with their IOAS, which was destroyed before they were removed.
   */
  uint64_t windows_lost;
};

/**
 * Where a window is to be.
 */
struct gmem_window_config {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * /dev/iommu. Duplicated: the caller's own may be closed afterwards.
   */
  int iommufd;
  /**
   * The id of the IOAS in the iommufd. A device must be attached already: without one the kernel
   * maps lazily, and refusals come when it is too late to act on them.
   *
   * It has to outlive the window: the kernel gives the id of an IOAS that is destroyed to the next
   * one, and guest memory would go to the devices of that. So remove the window first. If that
   * comes too late it is still well, as long as the id is nobody's.
   */
  uint32_t ioas_id;
  /**
   * First byte of the block that the window shows.
   */
  uint64_t offset;
  /**
   * Its length in bytes.
   */
  uint64_t length;
  /**
   * Where devices see it. All addresses of the window are its own, also where nothing is mapped
   * because a page is private: one unmap may go across these.
   */
  uint64_t iova;
  /**
   * 1: devices may read only.
   */
  uint8_t readonly;
};

/**
 * Somebody who uses a block's shared bytes.
 *
 * Both calls, of begin and of end, run on the thread that converts, with the range locked. Of the
 * library they may call only what asks about a block: gmem_block_host(), its files,
 * gmem_block_get_memslot(), gmem_block_get_run(), gmem_max_order(), gmem_block_check_access() and
 * gmem_block_get_stats(). Everything else may wait for this very conversion, also what gives memory
 * back (gmem_block_discard(), gmem_block_release_pending()) or makes it good (gmem_block_poison(),
 * gmem_block_place()). Nor may they wait for somebody who calls any of that, or take a lock that
 * somebody holds who does. The files are those of gmem_block_shared_fd() and
 * gmem_block_private_fd(). Either function may be NULL.
 */
struct gmem_listener_ops {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * Pages are about to change, and have not yet: let go of them if they become private. Called once
   * for each run of pages that changes. All runs of one conversion have one sequence: a begin and
   * its end are a pair by their offset and size, too.
   *
   * Who refuses a run ends the conversion with its errno, and is not told of the end of that run,
   * but of those that it had accepted. gmem_vm_detach() can't be refused: that is logged, the pages
   * change all the same, and who refused is not told of their end. The change is that of `size`
   * bytes at `offset` to `attribute`. Returns 0, or a negative errno that refuses it.
   */
  int (*begin)(void *opaque, uint64_t offset, uint64_t size, uint32_t attribute, uint64_t sequence);
  /**
   * They have changed (`changed`), or all is as before. Where a conversion failed half-way and
   * could not be undone, which is logged, it is said to be what lets nobody use a private page: to
   * have happened, if to private, and else not. `sequence` is that of `begin`, and grows from one
   * conversion of the block to the next.
   */
  void (*end)(void *opaque,
              uint64_t offset,
              uint64_t size,
              uint32_t attribute,
              bool changed,
              uint64_t sequence);
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Version of the library as "major.minor.patch"; static.
 */
const char *gmem_version(void);

/**
 * What the last gmem call of this thread that failed has to say, or the last gmem_memory_fault()
 * with a verdict other than GMEM_FAULT_SERVED or GMEM_FAULT_ECHO, if that was later: a sentence for
 * the user, in UTF-8, without a newline. Empty if there was none. Never NULL. Valid until this
 * thread's next gmem call that fails, or gmem_memory_fault() with such a verdict, or the thread's
 * end; copy it if you keep it. As all calls, it may also be made in exit handlers, and in
 * destructors of thread-specific data (pthread_key_create). The sentence is made when it is asked
 * for: to name who holds a page that can't become private (EAGAIN) takes a look at all files of the
 * process, a tenth of a second for 4,000. So ask if it is to be printed, and without a lock that
 * others wait for.
 *
 * C evaluates the arguments of one call in any order: printf("%d: %s", gmem_convert(…),
 * gmem_last_error()) may ask before there is an answer. Keep the errno in a variable first.
 */
const char *gmem_last_error(void);

/**
 * Sends the library's messages up to `max_level` (GMEM_LOG_ERROR … GMEM_LOG_TRACE) to `log`, and
 * also those of a panic, which is a bug. Once per process; without it messages are dropped.
 *
 * -EINVAL: the level is unknown.
 * -EBUSY: there is a receiver already.
 *
 * `log` and `opaque` stay valid for the rest of the process, for any thread; a NULL for `log` is
 * -EINVAL.
 */
int gmem_set_log(gmem_log_fn log, void *opaque, uint32_t max_level);

/**
 * Opens the VM behind a KVM VM file, which is duplicated: the caller may close its own whenever it
 * likes. Finds out what the kernel can do for such a VM, also by trying it on files of it that are
 * closed again. Ends with gmem_vm_free().
 *
 * -ENOTTY: it isn't that of a KVM VM.
 * -ENOTSUP: the pages of this host's kernel are not of 4 KiB.
 * -EBADF: `vm_fd` isn't open.
 * Another errno is that of dup(2), or of what was tried (KVM_CHECK_EXTENSION,
 *   KVM_CREATE_GUEST_MEMFD).
 *
 * `vm` points to memory for a pointer, which is written on success only; NULL is -EINVAL.
 */
int gmem_vm_new(int vm_fd, struct gmem_vm **vm);

/**
 * Ends a VM: the library's file of it is closed.
 *
 * -EBUSY: it has blocks; nothing happened.
 */
int gmem_vm_free(struct gmem_vm *vm);

/**
 * Lets go of a KVM VM that is about to be made anew, as on a reset of some confidential guests: DMA
 * out of all windows, all bindings ended, all guest_memfds closed, and the library's file of the
 * VM. Blocks, windows and listeners stay, and so do the addresses of the blocks' memory
 * (gmem_block_host()), which can't be touched where they showed a guest_memfd; the numbers of files
 * stay open, but on an empty file. All pages have their first attribute again, and have lost their
 * bytes; listeners are told of those that change.
 *
 * Until gmem_vm_attach(), whatever needs the VM fails with -EBUSY: conversions, bindings, new
 * blocks, preallocation. Blocks and windows may end, and windows may come, which show nothing yet.
 * The second time nothing happens. No vCPU may run, and no memory slot use the blocks. Takes all
 * ranges: waits for all conversions.
 *
 * -EBUSY: the VM is at its end, and nothing has happened.
 * Another errno is that of keeping the files' numbers (-EMFILE, -ENOMEM), or of a window's unmap.
 *
 * The VM is attached then, as before. Should the memory of a block not be mapped again, the error
 * names it, and gmem_block_check_access() refuses it until a rebuild works.
 */
int gmem_vm_detach(struct gmem_vm *vm);

/**
 * Goes on with a new KVM VM of the same kind, whose file is duplicated: new guest_memfds at the old
 * addresses and under the old numbers, every page with its first attribute, and windows filled
 * again. Whatever else is at these addresses by then, such as zeros that the VMM showed meanwhile,
 * is replaced. Bindings and memory slots are to be made anew, and so is the VMM's own advice on the
 * memory (madvise(2)), whose mapping is a new one in place. Takes what gmem_vm_detach() takes.
 *
 * -EBUSY: the VM isn't detached, or is at its end.
 * -ENOTTY: it isn't that of a KVM VM.
 * -ENOTSUP: it is that of a VM of another kind.
 * -EBADF: `new_vm_fd` isn't open.
 * Another errno is that of creating, mapping, allocating or pinning memory.
 *
 * The VM is detached then, as before.
 */
int gmem_vm_attach(struct gmem_vm *vm, int new_vm_fd);

/**
 * Prepares the end of the process, as an exit handler does, while its threads may still run. In
 * blocks that convert in place, private bytes are lost, and with them the files' record of what is
 * private, which a kernel with the faults of Linux 7.3's maple tree had better not take apart.
 * Memory stays mapped, shared bytes stay what they are but in huge pages with a private part, and
 * devices keep what they reach but in blocks of huge pages. From now on nothing converts: what
 * needs the VM fails with -EBUSY, gmem_vm_detach() and gmem_vm_attach() too. What needs nothing of
 * it works as before: to ask, to free what is kept, to end bindings, windows, listeners and blocks;
 * and so gmem_block_reset() of a block that is not confidential, where nothing changes, returns 0.
 * Nothing is done to other blocks, nor to those with 16 private runs or fewer, which no kernel
 * fails at. Called again, it does what it could not do before, and nothing else; so does the end of
 * each block.
 *
 * A vCPU that runs on may write to a private page between the two calls to the kernel that free and
 * share it. What it writes goes as well, but for a moment in between, host threads and who else has
 * the file mapped could read it: stop the vCPUs first, and no private byte is ever shown.
 *
 * Takes the range of each block that converts in place, but waits a second for all of them together
 * at most, since nobody may keep a process from its end. A process that is killed can't do this.
 *
 * -EBUSY: somebody had the range of some blocks, which the error names, such as a conversion or a
 *   preallocation. Their files are as they were, and nothing converts all the same.
 *
 * What can't be done in one block is no error: it is logged, and tried again when that block ends.
 */
int gmem_vm_end(struct gmem_vm *vm);

/**
 * What the kernel can do for this VM, as it was found when the VM was opened.
 *
 * `probe` points to a structure of `struct_size` bytes; NULL is -EINVAL.
 */
int gmem_vm_probe(const struct gmem_vm *vm, struct gmem_probe *probe);

/**
 * Counts since the VM was opened. Takes no lock, so that some may have a conversion that others
 * don't have yet.
 *
 * `stats` points to a structure of `struct_size` bytes; NULL is -EINVAL.
 */
int gmem_vm_get_stats(const struct gmem_vm *vm, struct gmem_vm_stats *stats);

/**
 * The host's hardware has lost memory that the guest uses, private or shared: that of whole pages
 * around `size` bytes at `gpa`, as when KVM_RUN fails with EHWPOISON and a memory-fault exit that
 * says where. What follows is that of gmem_block_poison(). The range may cross bindings; bytes that
 * are no memory of a block are left out. Waits for conversions around it. No memory slot may come
 * or go meanwhile. Not from a signal handler.
 *
 * -EBUSY: the VM is detached, or at its end.
 * -EINVAL: the range is empty, wraps, or has no memory of a block.
 * Another errno is as with gmem_block_poison(): all that could be done is done.
 */
int gmem_vm_poison(struct gmem_vm *vm, uint64_t gpa, uint64_t size);

/**
 * Serves a guest's request to make `size` bytes at `gpa` GMEM_SHARED or GMEM_PRIVATE, as a whole or
 * not at all. It may cross bindings and blocks. Pages that have the attribute already cost nothing.
 * Bytes that are no memory of a block are ignored and counted (gmem_vm_stats.ignored_bytes) when
 * they are to be shared, since they are (a TDX firmware shares MMIO and holes to be safe), and
 * refused when they are to be private.
 *
 * Before anything changes, pages that have the attribute already and are quarantined are healed:
 * devices get shared ones again, and lose what they may still have behind private ones. If the
 * kernel still refuses that, the request fails.
 *
 * Takes the range: waits for requests that overlap, while disjoint ones run in parallel. What
 * becomes shared in a split block has memory in both planes until the request is done: all requests
 * of the VM together 1 GiB at most, or the largest gmem_block_config.max_request if that is more,
 * and who finds no room waits for those before it. Listeners are called with the range held, and
 * must not call this. It takes its time in the kernel (KVM_SET_MEMORY_ATTRIBUTES, in place
 * KVM_SET_MEMORY_ATTRIBUTES2; IOMMU_IOAS_MAP and UNMAP; fallocate(2)): call it without a lock that
 * others wait for.
 *
 * gmem_hypercall_result() turns the errno into what a guest may be told.
 *
 * -EBUSY: the VM is detached, or at its end.
 * -EINVAL: the range is empty, not page aligned, or wraps; it is not whole units of
 *   gmem_block_config.convert_unit; it is to be private and has something that can't be.
 * -ENOSPC: more than gmem_block_config.max_runs or gmem_block_config.max_request allow.
 * -ENOMEM: there is no memory for the pages, or for the library's books, or a pool of huge pages is
 *   empty.
 * -EIO: the host's hardware has lost the memory of a page, or the memory that it would have.
 * -EAGAIN: somebody holds a page that is to become private in place.
 * Another errno is the kernel's, or that of a listener that refused.
 *
 * Attributes, backing and DMA are as they were then, but for the bytes of pages that convert in
 * place, which are undefined. Where undoing failed, the range is quarantined, and the log says so.
 */
int gmem_convert(struct gmem_vm *vm, uint64_t gpa, uint64_t size, uint32_t attribute);

/**
 * Has the kernel make `size` bytes at `offset` of a guest_memfd of this VM GMEM_SHARED or
 * GMEM_PRIVATE in place, for a file that is the VMM's own and no block's: where the kernel converts
 * in place, only the file knows what is private. All of it or nothing. Pages that have the
 * attribute already cost nothing. The file is one of single pages.
 *
 * The library keeps no books of it: devices are to have lost pages that become private before, and
 * whoever has mapped the file finds no memory behind them afterwards. Takes no lock; two callers
 * for the same pages are the VMM's matter. Waits for up to a tenth of a second while somebody holds
 * a page.
 *
 * -EINVAL: the range is empty, not page aligned, wraps, or isn't in the file; or the VM's type has
 *   no private memory.
 * -ENOTSUP: the kernel doesn't convert in place.
 * -EAGAIN: somebody holds a page that is to become private.
 * -EBADF: `guest_memfd` isn't open.
 * Another errno is the kernel's (KVM_SET_MEMORY_ATTRIBUTES2): -ENOMEM, or -ENOTTY if the file is no
 *   guest_memfd.
 */
int gmem_vm_convert_file(struct gmem_vm *vm,
                         int guest_memfd,
                         uint64_t offset,
                         uint64_t size,
                         uint32_t attribute);

/**
 * A number that grows whenever a conversion ends. A VMM reads it, with acquire semantics, each time
 * before a vCPU enters KVM_RUN, and hands what it read to gmem_memory_fault() if the vCPU comes out
 * with a memory fault. Read it by `__atomic_load_n(p, __ATOMIC_ACQUIRE)`. Valid as long as the VM.
 * NULL for a handle that is not a VM's, with a sentence for gmem_last_error().
 */
const uint64_t *gmem_vm_sequence(const struct gmem_vm *vm);

/**
 * Serves a KVM_EXIT_MEMORY_FAULT of a vCPU that accessed `size` bytes at `gpa` as if they were
 * `attribute` (private if the exit's flags have KVM_MEMORY_EXIT_FLAG_PRIVATE): converts them where
 * that is what the guest means, and otherwise says what it is (GMEM_FAULT_…).
 *
 * `entered` is the number of gmem_vm_sequence() from before the vCPU entered KVM_RUN. With
 * UINT64_MAX no fault is an echo: for one that has been GMEM_FAULT_ECHO again and again.
 *
 * `converts` says whether the kind of an access is the guest's choice. On KVM_X86_SW_PROTECTED_VM
 * it follows the attribute, and no fault asks for anything.
 *
 * No memory slot may come or go meanwhile. If it converts, it locks and waits as gmem_convert():
 * call it without a lock that others wait for.
 *
 * `verdict` gets the GMEM_FAULT_…, and gmem_last_error() says why, unless it is GMEM_FAULT_SERVED
 * or GMEM_FAULT_ECHO. `converts` is 0 or 1.
 *
 * -EINVAL: an unknown attribute or `converts`. Whatever else is wrong is in the verdict.
 *
 * `verdict` points to memory for its type; NULL is -EINVAL.
 */
int gmem_memory_fault(struct gmem_vm *vm,
                      uint64_t gpa,
                      uint64_t size,
                      uint32_t attribute,
                      uint32_t converts,
                      uint64_t entered,
                      uint32_t *verdict);

/**
 * What `hypercall.ret` of a KVM_HC_MAP_GPA_RANGE exit is to hold (kvm_is_valid_map_gpa_range_ret),
 * for what gmem_convert() returned as `error`: 0 for 0; with `can_retry` not 0, EAGAIN for -EAGAIN
 * and -ENOMEM, for guests that take that for "ask again" (TDX); EINVAL for all else. Positive.
 */
uint64_t gmem_hypercall_result(int error, uint32_t can_retry);

/**
 * Creates a block in a VM: its files (KVM_CREATE_GUEST_MEMFD; in split also memfd_create(2)), and
 * the mapping of its shared bytes. May block in the kernel; waits for a rebuild of the VM.
 *
 * The files are close-on-exec, here and after gmem_vm_attach(). The kernel makes a guest_memfd
 * without (KVM_CREATE_GUEST_MEMFD has no flag for it), and the library sets it right after: a child
 * that another thread forks in between, and that executes a program without closing what it does
 * not know, has the guest_memfd and with it the VM. So does a child that executes nothing, which
 * also has the memory, unless gmem_block_config.not_in_children says otherwise.
 *
 * A memfd's size is sealed, and so are its seals (F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_SEAL): whoever
 * is given it can't truncate it. A guest_memfd has no seals, and a fixed size.
 *
 * Ends with gmem_block_free().
 *
 * -EBUSY: the VM is detached, or at its end.
 * -EINVAL: the configuration makes no sense. The sentence says which part of it, and what to do.
 * -ENOTSUP: the kernel, or this version, can't serve it. So does that sentence.
 * Another errno is that of creating, mapping or allocating the files (-ENOMEM, -ENOSPC, -EMFILE).
 *
 * Nothing is left behind then.
 *
 * `config` points to a structure of `struct_size` bytes, whose `name` is NULL or a NUL-terminated
 * string and whose `policy_nodes` has `policy_words` words; `block` points to memory for a pointer.
 * NULL for either is -EINVAL.
 */
int gmem_block_new(struct gmem_vm *vm,
                   const struct gmem_block_config *config,
                   struct gmem_block **block);

/**
 * Ends a block and frees its memory; pointers and file descriptors got from it are void. Its memory
 * slots must be gone. Waits for a rebuild of the VM.
 *
 * -EBUSY: it is bound, in a DMA window or listened to; nothing happened. So it is while a window
 *   that gmem_window_new() could not make can't be closed: try again.
 */
int gmem_block_free(struct gmem_block *block);

/**
 * Where its shared bytes are mapped: page aligned, for as long as the block lives. In a split block
 * the address of a private page reads and writes memory that the guest never sees, and in place it
 * is a SIGBUS: ask gmem_block_check_access() first. NULL for a handle that is not a block's, with a
 * sentence for gmem_last_error().
 */
void *gmem_block_host(const struct gmem_block *block);

/**
 * The file with the shared bytes, at their offsets: for vhost-user, never for VFIO, which goes by
 * gmem_window_new(). In place it is the guest_memfd. A file descriptor, or a negative errno. Stays
 * the library's: don't close it.
 *
 * A process that maps the file with the shared bytes and touches a page that the guest has turned
 * private gets SIGBUS in place, and in split from a pool of huge pages that is empty: don't give it
 * away there, if the process can't bear that. In split in small pages it gets what the page left,
 * while that is kept, and then a page of zeros, which is freed after the next conversion to
 * private.
 */
int gmem_block_shared_fd(const struct gmem_block *block);

/**
 * The file with the private bytes, at their offsets: the guest_memfd, for memory slots. In place it
 * is that of gmem_block_shared_fd(). A file descriptor, or a negative errno. Stays the library's:
 * don't close it.
 */
int gmem_block_private_fd(const struct gmem_block *block);

/**
 * What KVM_SET_USER_MEMORY_REGION2 needs for the memory slot, in address space 0, that shows the
 * block from `offset` on, with KVM_MEM_GUEST_MEMFD set. Neither KVM_MEM_LOG_DIRTY_PAGES nor
 * KVM_MEM_READONLY may be set with it. Its size is the caller's choice: whole pages, to the block's
 * end at most.
 *
 * -EBUSY: the VM is detached, or at its end.
 * -EINVAL: the offset isn't page aligned, or not in the block.
 *
 * `slot` points to a structure of `struct_size` bytes; NULL is -EINVAL.
 */
int gmem_block_get_memslot(const struct gmem_block *block,
                           uint64_t offset,
                           struct gmem_memslot *slot);

/**
 * Fills each page's memory in the plane that its attribute selects, with `threads` threads (0
 * counts as 1); poisoned pages are left out. Memory is there afterwards; whether it has been
 * cleared already depends on which way of filling it was the quicker one. Locks the block until it
 * is done: conversions in it wait.
 *
 * -EBUSY: the VM is detached, or at its end.
 * -ENOMEM, -ENOSPC: there isn't enough memory.
 * -EFAULT: a page can't be touched.
 *
 * Part of it is filled then.
 */
int gmem_block_preallocate(struct gmem_block *block, uint32_t threads);

/**
 * Makes every page what it was at first, as a reset of the VM asks. Pages that become shared lose
 * their bytes before anybody can see them, and host and devices find zeros. In place so do the
 * shared pages of a huge page that has a private part; all other shared pages keep their bytes, and
 * what shared ones hold that become private is undefined. DMA windows follow. Poisoned pages get
 * fresh memory first, and devices get at last what is shared and quarantined; what they can't be
 * given even now stays so, which is no error of a reset. What is kept
 * (gmem_block_config.release_delay_ms) is freed.
 *
 * No vCPU may run. It works in pieces, so that the block's memory is never needed twice, and waits
 * for conversions in each; listeners are called as by gmem_convert(). Shared memory is not
 * reserved, but for huge pages.
 *
 * -EBUSY: the VM is at its end, and the block is confidential or has poisoned pages. In one that is
 *   detached there is nothing to reset.
 * -EIO: memory was lost meanwhile.
 * Another errno is as with gmem_convert(), or that of freeing or allocating memory for poisoned
 *   pages.
 *
 * All pieces are tried, unless somebody holds pages in many of them: what could be done is done.
 * Where it failed, bytes may be gone, but no private one is shown. Poisoned pages without fresh
 * memory stay poisoned and keep their attribute, since a kernel that converts one would touch it.
 */
int gmem_block_reset(struct gmem_block *block);

/**
 * Copies bytes to `offset`, for what a guest finds in memory at its start: firmware, a kernel.
 * Pages that have a part in it have memory afterwards, and the attribute that they had before: in
 * place, private ones are shared for the copy, by a conversion that devices and listeners don't
 * see. What the guest then finds in these is for the VM's type to say, also in the rest of a page
 * that is written in part: launch commands (SNP, TDX) take the page as it is and encrypt it. No
 * vCPU may run. Waits for conversions of these pages. The bytes are `size` at `data`.
 *
 * -EBUSY: the VM is detached or at its end, or a rebuild of it could not map the memory again.
 * -EINVAL: no bytes, or not in the block.
 * -ENOTSUP: private pages of a split block, which the VMM can't reach.
 * -EIO: a page is poisoned.
 * -ENOMEM, -ENOSPC: there is no memory.
 * Another errno is the kernel's, which refused to share a page.
 *
 * Nothing is copied then, and all attributes are as before. If the kernel refuses to make a page
 * private again (-EAGAIN: somebody holds it), the bytes are there, and the page is shared and
 * quarantined.
 *
 * `data` points to `size` bytes, which are not the block's own; NULL is -EINVAL.
 */
int gmem_block_place(struct gmem_block *block, uint64_t offset, const void *data, uint64_t size);

/**
 * Frees at once the memory that pages have left and that is kept for a while, of both planes: see
 * gmem_block_config.release_delay_ms. What can't be freed is logged, and counted
 * (gmem_block_stats.release_failures). Waits for conversions where it is, so not in a call of a
 * listener; takes no other lock, and needs none of its caller's.
 */
int gmem_block_release_pending(struct gmem_block *block);

/**
 * Gives the memory of `size` bytes at `offset`, whole pages, back to the host, as when a guest
 * inflates a balloon or reports pages free. They keep their attributes, and whoever touches one
 * next gets new memory. Shared pages read zero on return. What a guest finds in a private one is
 * for the VM's type to say: zeros on KVM_X86_SW_PROTECTED_VM; on TDX and SNP the page must be
 * accepted or validated anew, so only a guest that does so may be offered this.
 *
 * Huge pages from a pool go as a whole, and those of a split block only where nobody was promised
 * that a shared page has its memory (see gmem_block_config.no_reserve); other shared pages are
 * zeroed and keep it. In place they stay set aside for the block, and shared pages of one that does
 * not go as a whole have memory afterwards. Under a NUMA policy, new private memory comes from
 * where the vCPU's own policy says.
 *
 * Nothing that a device has mapped is discarded: it would go on with the old memory, or, mapped
 * anew, have new memory at once, for nothing. Who else has pages pinned keeps the old ones: the VMM
 * must not discard beside those. Listeners are not told.
 *
 * It works in pieces of 64 MiB, or of one huge page if that is larger, and waits for conversions in
 * each, widened to whole huge pages and DMA units: what converts elsewhere meanwhile does not wait,
 * and before and after each piece all is as the books say. Zeroing frees nothing and takes its
 * time, for which the VMM's main loop may have to wait, so no more than 32 MiB are zeroed: a range
 * in which that is not enough is refused.
 *
 * -EBUSY: the VM is detached or at its end, or a DMA window maps a page of the range.
 * -EINVAL: the range is empty, not page aligned, or not in the block.
 * -EIO: a page is poisoned.
 * -ENOSPC: more than 32 MiB would have to be zeroed: ask for less, or for whole huge pages.
 * Another errno is that of fallocate(2).
 *
 * Nothing has happened then, unless it came to that between two pieces, or in one: parts of the
 * range may be gone, attributes are as before, and it may be asked for again.
 */
int gmem_block_discard(struct gmem_block *block, uint64_t offset, uint64_t size);

/**
 * The host's hardware has lost the memory that gmem_block_host() shows for `size` bytes at
 * `offset`, as a SIGBUS says: of whole pages around them. In a split block that is shared memory,
 * also behind pages that are private now, which stay usable. gmem_vm_poison() is for what a guest
 * uses. Not from the SIGBUS handler itself, which may have interrupted the library: hand the
 * address to a thread.
 *
 * No device reaches lost pages any more, the guest can't convert them, nor others to them,
 * gmem_block_check_access() and gmem_max_order() refuse them, and preallocation leaves them out,
 * until gmem_block_reset() gives them fresh memory or the VM is rebuilt. Twice is as good as once.
 * In a block of an ordinary VM the 1 GiB around them is out for a moment, as far as windows show
 * it: devices that use it fault.
 *
 * Waits for conversions around them. Should the VM be rebuilt meanwhile, the memory is another, and
 * nothing happens. Listeners are not told.
 *
 * -EBUSY: the VM is detached, or at its end.
 * -EINVAL: the range is empty, or not in the block.
 * Another errno is that of a window's unmap, when devices may still reach some of it, or of a map,
 *   when what left with it could not be put back. The pages are poisoned all the same. Either is
 *   quarantined, and the VM's own attempts go on.
 */
int gmem_block_poison(struct gmem_block *block, uint64_t offset, uint64_t size);

/**
 * The block's numbers: its state now, and counts since it was created. Locks for moments only, so
 * that some may have a conversion that others don't have yet.
 *
 * `stats` points to a structure of `struct_size` bytes; NULL is -EINVAL.
 */
int gmem_block_get_stats(const struct gmem_block *block, struct gmem_block_stats *stats);

/**
 * The attribute of the page at `offset`, and the offset where the run of pages with the same
 * attribute ends. Of this moment: a conversion may follow at once, unless a listener asks about its
 * own range. `attribute` gets the one, GMEM_SHARED or GMEM_PRIVATE, `end` the other.
 *
 * -EINVAL: the offset isn't in the block.
 *
 * `end` and `attribute` point to memory for their types. NULL for either is -EINVAL.
 */
int gmem_block_get_run(const struct gmem_block *block,
                       uint64_t offset,
                       uint64_t *end,
                       uint32_t *attribute);

/**
 * How large a mapping may be that holds the page at `offset` and pages of one attribute only: log2
 * of the pages in the largest naturally aligned range of the block around it. Of this moment,
 * unless a listener asks about its own range. Takes no lock that a conversion holds while it waits.
 *
 * -EINVAL: the offset isn't in the block.
 * -EIO: the page is poisoned.
 *
 * `order` points to memory for its type; NULL is -EINVAL.
 */
int gmem_max_order(const struct gmem_block *block, uint64_t offset, uint32_t *order);

/**
 * Asks whether the VMM may touch `size` bytes at `offset` of gmem_block_host(): all of them are
 * shared, and none is poisoned. One atomic load while the block has no such page. The answer is of
 * this moment: a conversion may follow at once.
 *
 * -EACCES: a page is private; it is counted (gmem_block_stats.access_refused).
 * -EIO: a page is poisoned.
 * -EBUSY: the VM is detached, or a rebuild of it could not map the memory again.
 * -EINVAL: the range is not in the block.
 */
int gmem_block_check_access(const struct gmem_block *block, uint64_t offset, uint64_t size);

/**
 * Shows `size` bytes of the block from `offset` on at `gpa`, and tells the kernel their attributes
 * (KVM_SET_MEMORY_ATTRIBUTES; in place it knows them by the file). Their memory slot may exist or
 * follow: KVM keeps attributes by address. Waits for conversions of these pages, and for who binds
 * or unbinds at these addresses.
 *
 * -EBUSY: the VM is detached, or at its end.
 * -EINVAL: the range is empty, not page aligned, wraps, or is not in the block.
 * -EEXIST: an address or an offset is bound already.
 * Another errno is that of KVM_SET_MEMORY_ATTRIBUTES, also for what an earlier binding has left
 *   private at these addresses.
 *
 * Nothing is bound then, and the addresses are shared for the kernel, or will be when they are
 * bound next.
 */
int gmem_bind(struct gmem_block *block, uint64_t offset, uint64_t size, uint64_t gpa);

/**
 * Ends a binding, given exactly as it was made. For the kernel its addresses are shared afterwards,
 * so its memory slot has to be gone: a vCPU would find shared memory where it left a private page.
 * Waits for conversions of these pages, and for who binds or unbinds at these addresses.
 *
 * -EINVAL: there is no such binding.
 * Another errno is that of KVM_SET_MEMORY_ATTRIBUTES. The binding has ended all the same, but the
 *   kernel holds its addresses for private, and a vCPU finds no memory there, until some are bound
 *   again: that makes them shared before all else, or fails.
 */
int gmem_unbind(struct gmem_block *block, uint64_t offset, uint64_t size, uint64_t gpa);

/**
 * Makes a new IOAS fit for windows that are cut (GMEM_STRATEGY_CUT): its mappings are of single
 * pages in the IOMMU (IOMMU_OPTION_HUGE_PAGES = 0), and so any part of one can be unmapped by
 * itself. Devices' IOTLBs then hold 4 KiB entries, as they do when memory is mapped page by page.
 * To be called between IOMMU_IOAS_ALLOC and the first mapping. May block in the kernel; takes no
 * lock of the library.
 *
 * -ENOTTY, or what else that file answers: it is no iommufd.
 * -ENOENT: it has no such IOAS.
 * -EINVAL: too late: devices are attached to the IOAS, and something is mapped
 *   (iopt_disable_large_pages).
 * -EBADF: `iommufd` isn't open.
 *
 * Nothing changed then, and windows there take another strategy or, if GMEM_DMA_SPLIT_CUT was asked
 * for, fail.
 */
int gmem_ioas_prepare(int iommufd, uint32_t ioas_id);

/**
 * Shows a part of the block to the devices of an IOAS: all of its shared pages now, and from now on
 * whatever becomes shared. Pins memory, which the kernel counts against RLIMIT_MEMLOCK. Waits for
 * conversions of that part. Ends with gmem_window_free().
 *
 * -EINVAL: the range is empty, not page aligned, or not in the block; the IOVAs wrap, or the IOAS
 *   reserves some.
 * -ENOTTY, or what else that file answers: it is no iommufd.
 * -ENOENT: it has no such IOAS.
 * -EEXIST: another window, of whichever block, has some of these addresses of the IOAS; or the IOAS
 *   has something else there, where pages are shared; elsewhere a conversion finds that out.
 * -EBUSY: the kernel refuses to unmap what was left at these addresses, or somebody is having it
 *   unmapped: try again.
 * -ENOTSUP: gmem_block_config.dma or gmem_block_config.dma_split insists on a way that the kernel
 *   refuses, or the memory is out of the kernel's direct map.
 * -ENOMEM: pages can't be pinned.
 * -EBADF: the iommufd isn't open.
 *
 * Nothing is mapped then. Should the kernel refuse even to take back what was mapped, which is
 * logged, those pages can't become private, and that is tried again from time to time, by the
 * block's next window and at its end. What is left even then, and pages of no meaning that were
 * mapped to try a cut, are unmapped by who next wants these addresses of the IOAS, or when the
 * library's last window of the iommufd ends: destroy no IOAS in which something is left, nor have
 * another get its number, before that. Where one has, what it has at the end of what was left can't
 * be told from it, and is unmapped.
 *
 * `config` points to a structure of `struct_size` bytes; `window` points to memory for a pointer.
 * NULL for either is -EINVAL.
 */
int gmem_window_new(struct gmem_block *block,
                    const struct gmem_window_config *config,
                    struct gmem_window **window);

/**
 * Makes a window show another part of the block, as when a guest's address map changes around it.
 * What both parts have in common stays mapped all the time and costs nothing, except where it is
 * one kernel area with what goes. The new configuration has the same IOAS and access, and the same
 * IOVA for each offset. Waits for conversions of what comes and what goes, and for who changes the
 * same window. The iommufd is not looked at.
 *
 * -EINVAL: it has ended, the configuration differs in more than the range, or the two parts are
 *   apart.
 * Another errno is as with gmem_window_new().
 *
 * The window shows what it showed before then, or, if the kernel refused to unmap, both parts. What
 * it can't show again is quarantined (gmem_block_stats.bytes_quarantined) until it converts or is
 * asked for, a window comes, goes or is reshaped there, the block is reset, or the VM's own
 * attempts succeed.
 *
 * `config` points to a structure of `struct_size` bytes; NULL is -EINVAL.
 */
int gmem_window_reshape(struct gmem_window *window, const struct gmem_window_config *config);

/**
 * Ends a window: devices reach nothing through it any more. An IOAS that has been destroyed has
 * nothing mapped: that is no error. Waits for conversions of its part. Closes the library's
 * iommufd, too.
 *
 * -EINVAL: it has ended already.
 * Another errno is that of the kernel, which refused to unmap. The window stays, takes nothing in
 *   any more, and its pages can't become private until they are out of it. Try again once whoever
 *   holds them in the IOAS is gone.
 */
int gmem_window_free(struct gmem_window *window);

/**
 * Tells a listener of every conversion in the block from now on. Locks the block: waits for
 * conversions under way, of which it would hear nothing. Ends with gmem_listener_remove().
 *
 * `ops` points to a structure of `struct_size` bytes, which is copied; its functions and `opaque`
 * stay valid, for any thread, until gmem_listener_remove() has returned. `listener` points to
 * memory for a pointer. NULL for either is -EINVAL.
 */
int gmem_listener_add(struct gmem_block *block,
                      const struct gmem_listener_ops *ops,
                      void *opaque,
                      struct gmem_listener **listener);

/**
 * Ends a registration. No call of it is under way when this returns: it waits for those, and must
 * not be called from one.
 */
int gmem_listener_remove(struct gmem_listener *listener);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* GMEM_H */
