/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * gmem: owns a guest's memory on KVM guest_memfd.
 *
 * Generated from src/capi.rs and src/capi/: change it there.
 *
 * Every structure starts with its own size in bytes, set by the caller; unset fields must be zero,
 * which is the default of each. Every function returns 0 or a negative errno unless its comment
 * says otherwise, may be called from any thread, and leaves a sentence for gmem_last_error() when it
 * fails. Handles are opaque and checked: a stale one is an error.
 *
 * A child of fork(2) may call nothing here if its parent has several threads: what another thread had
 * locked stays locked in the child, and a call may never return. Ending and executing a program need
 * no call; the library has no handlers for either. Until then a child has its parent's VM, whose ioctls the
 * kernel serves for the parent only.
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
 * One guest_memfd for all bytes.
 */
#define GMEM_BACKING_IN_PLACE 1

/**
 * A memfd for shared bytes, a guest_memfd for private ones.
 */
#define GMEM_BACKING_SPLIT 2

/**
 * The attribute of pages that host and devices may reach.
 */
#define GMEM_SHARED 0

/**
 * The attribute of pages that only the guest may reach.
 */
#define GMEM_PRIVATE 1

/**
 * The vCPU is to run again: the pages have the attribute.
 */
#define GMEM_FAULT_SERVED 0

/**
 * The vCPU is to run again: a conversion came by, and the fault may mean nothing.
 */
#define GMEM_FAULT_ECHO 1

/**
 * The vCPU may run again, but if the same fault comes without end, nobody can serve it: the pages have the
 * attribute, or an access of this guest asks for nothing.
 */
#define GMEM_FAULT_UNEXPLAINED 2

/**
 * The vCPU is to wait and run again: the host, or the guest, may free what is missing now.
 */
#define GMEM_FAULT_LATER 3

/**
 * The vCPU can't go on, now or later.
 */
#define GMEM_FAULT_NEVER 4

/**
 * By file and offset where the kernel takes the file, else by address.
 */
#define GMEM_DMA_AUTO 0

/**
 * By file and offset (IOMMU_IOAS_MAP_FILE).
 */
#define GMEM_DMA_FD 1

/**
 * By address (IOMMU_IOAS_MAP).
 */
#define GMEM_DMA_HVA 2

/**
 * Cut where that works; else by `dma_unit` if one is given, else page by page.
 */
#define GMEM_DMA_SPLIT_AUTO 0

/**
 * Map large, unmap any part. Needs an IOAS after gmem_ioas_prepare().
 */
#define GMEM_DMA_SPLIT_CUT 1

/**
 * Map in areas of `dma_unit` bytes at most. When a part of one becomes private, all of it is unmapped
 * and the rest mapped again: devices that touch the rest meanwhile fault.
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
 * One kernel area per window.
 */
#define GMEM_STRATEGY_WHOLE 1

/**
 * One kernel area per page.
 */
#define GMEM_STRATEGY_PAGE 2

/**
 * One kernel area per converted range, cut where a part of it becomes private.
 */
#define GMEM_STRATEGY_CUT 3

/**
 * Kernel areas of `dma_unit` bytes at most.
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
 * For `convert_unit`: a guest may convert nothing in this block.
 */
#define GMEM_CONVERT_UNIT_OFF UINT64_MAX

/**
 * Memory comes from wherever the thread that first needs it would get it.
 */
#define GMEM_POLICY_DEFAULT 0

/**
 * From one node while it has some, then from others.
 */
#define GMEM_POLICY_PREFERRED 1

/**
 * From the given nodes or not at all.
 */
#define GMEM_POLICY_BIND 2

/**
 * From the given nodes in turn.
 */
#define GMEM_POLICY_INTERLEAVE 3

/**
 * One backend instance: guest memory of one size.
 */
struct gmem_block;

/**
 * One registration of a listener.
 */
struct gmem_listener;

/**
 * One KVM VM.
 */
struct gmem_vm;

/**
 * One IOAS, and the range of IOVAs in it that shows part of a block.
 */
struct gmem_window;

/**
 * Receives one message: a level (GMEM_LOG_…) and a NUL-terminated line without a newline. It may
 * be called on any thread, with locks of the library held, and must not call the library.
 */
typedef void (*gmem_log_fn)(void *opaque, uint32_t level, const char *message);

/**
 * What the kernel can do for a VM.
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
   * A guest_memfd can be mapped.
   */
  bool guest_memfd_mmap;
  /**
   * A guest_memfd's pages can start shared.
   */
  bool guest_memfd_init_shared;
  /**
   * The VM has a private attribute per page, kept by the VM (to Linux 7.3).
   */
  bool private_attribute;
  /**
   * The VM has a private attribute per page, kept by its guest_memfds, whose pages are converted in
   * place. A VM can have private memory if this or `private_attribute` is true.
   */
  bool in_place_conversion;
  /**
   * A guest_memfd can be out of the kernel's direct map. Experimental.
   */
  bool no_direct_map;
  /**
   * A guest_memfd can be filled by write(2).
   */
  bool write_populate;
  /**
   * Of pages of how many bytes a guest_memfd can be, other than 4096, ORed: 2 MiB, 1 GiB; 0: none.
   */
  uint64_t huge_page_sizes;
};

/**
 * Counts of a VM since gmem_vm_new().
 */
struct gmem_vm_stats {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * Conversion requests, senseless ones included.
   */
  uint64_t requests;
  /**
   * Those that got an error.
   */
  uint64_t failures;
  /**
   * Bytes to be shared that are no memory of a block: ignored.
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
 * What a block is to be like. All zero but for `struct_size` and `size`: an ordinary VM's memory, with
 * the defaults.
 */
struct gmem_block_config {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * For messages: NUL-terminated UTF-8, or NULL.
   */
  const char *name;
  /**
   * Bytes of guest memory, a multiple of 4096.
   */
  uint64_t size;
  /**
   * GMEM_BACKING_….
   */
  uint32_t backing;
  /**
   * GMEM_SHARED or GMEM_PRIVATE: every page's attribute at first and after gmem_block_reset().
   */
  uint32_t initial;
  /**
   * 1: pages may be private.
   */
  uint8_t confidential;
  /**
   * 1: when there is no memory for what became shared, the first access fails, and not the conversion.
   */
  uint8_t no_reserve;
  /**
   * 1: memory from the host's pool of huge pages: the shared half of a split block, or all of one in
   * place of a confidential VM, where gmem_probe's `huge_page_sizes` has the size.
   */
  uint8_t hugetlb;
  /**
   * 1: guest memory leaves the kernel's direct map. Experimental, and only where gmem_probe's
   * `no_direct_map` says that the kernel can: nothing can pin such memory, so that DMA windows are
   * refused.
   */
  uint8_t no_direct_map;
  /**
   * Bytes of such a huge page: 2 MiB, 1 GiB, or 0 for 2 MiB. Only with `hugetlb`.
   */
  uint64_t hugetlb_size;
  /**
   * GMEM_DMA_….
   */
  uint32_t dma;
  /**
   * GMEM_DMA_SPLIT_….
   */
  uint32_t dma_split;
  /**
   * Bytes for GMEM_DMA_SPLIT_UNIT, and for GMEM_DMA_SPLIT_AUTO where cutting doesn't work: a power of
   * two. 0: 2 MiB for the one, none for the other.
   */
  uint64_t dma_unit;
  /**
   * Smallest range that a guest may convert, in bytes: a power of two, 0 for 4096, or
   * GMEM_CONVERT_UNIT_OFF.
   */
  uint64_t convert_unit;
  /**
   * Most private runs that a guest may make, which bounds what they cost here and in the kernel. 0: the
   * library's own bound, which is none for split, and 1400 for confidential blocks in place. No bound
   * protects a kernel that fails to free the record of runs: see gmem_vm_end().
   */
  uint64_t max_runs;
  /**
   * GMEM_POLICY_…: from which NUMA nodes memory of both planes comes.
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
   * How long, in milliseconds, the memory that a page of a split block leaves is kept before it is the
   * host's again, so that a page which comes back meanwhile finds it, and in it what it left. It is
   * released after one to two delays, or a second later where nothing was kept for a while; before
   * that when memory is short, by gmem_block_reset() and gmem_block_release_pending(), and when the block
   * ends. 0: 100; for none, set `release_at_once`. What is kept of shared memory stays visible to who has the
   * file or its mapping: host, vhost and vhost-user back ends; devices and the guest don't reach it.
   */
  uint32_t release_delay_ms;
  /**
   * 1: memory is released in the conversion, without delay.
   */
  uint8_t release_at_once;
  /**
   * 1: private memory may be kept, too. Only for VM types of which it is known that the guest's page may
   * outlive its conversion: KVM_X86_SW_PROTECTED_VM. On TDX and SNP the state of a page (S-EPT, RMP) is
   * tied to its memory, and nobody has shown that it may.
   */
  uint8_t keeps_private;
  /**
   * 1: children that the process forks have no mapping of the memory (MADV_DONTFORK).
   */
  uint8_t not_in_children;
  /**
   * 1: core dumps leave the memory out (MADV_DONTDUMP).
   */
  uint8_t not_in_core_dumps;
  /**
   * Most bytes that are kept so, in both planes; what comes on top is released at once. 0: 64 MiB.
   */
  uint64_t max_pending;
  /**
   * Most bytes that one request of a guest may change, from the first page of a block that changes to the
   * last, and in all blocks that it is about together: more than the smallest bound of those gets ENOSPC. 0:
   * 1 GiB, or `convert_unit` if that is more. SNP asks for 253 huge pages of 2 MiB at most in one page state change, and
   * TDX's MapGPA comes in requests of 2 MiB. gmem_block_reset() is not bound by it.
   */
  uint64_t max_request;
};

/**
 * What KVM_SET_USER_MEMORY_REGION2 needs.
 */
struct gmem_memslot {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * `userspace_addr`.
   */
  void *userspace_addr;
  /**
   * `guest_memfd`; stays the library's.
   */
  int guest_memfd;
  /**
   * `guest_memfd_offset`, in bytes.
   */
  uint64_t guest_memfd_offset;
};

/**
 * State of a block, and counts since it was created.
 */
struct gmem_block_stats {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * GMEM_BACKING_IN_PLACE or GMEM_BACKING_SPLIT.
   */
  uint32_t backing;
  /**
   * GMEM_STRATEGY_….
   */
  uint32_t strategy;
  /**
   * GMEM_DMA_FD or GMEM_DMA_HVA, or GMEM_DMA_AUTO while nothing is mapped.
   */
  uint32_t dma_path;
  /**
   * Bytes.
   */
  uint64_t size;
  /**
   * Bytes that are private.
   */
  uint64_t bytes_private;
  /**
   * Bytes that are shared.
   */
  uint64_t bytes_shared;
  /**
   * Bytes that devices reach; one that two windows show counts twice.
   */
  uint64_t bytes_dma_mapped;
  /**
   * Bytes that no device reaches after an undo that failed.
   */
  uint64_t bytes_quarantined;
  /**
   * Private runs.
   */
  uint64_t runs;
  /**
   * Bindings.
   */
  uint64_t bindings;
  /**
   * DMA windows.
   */
  uint64_t windows;
  /**
   * Kernel areas of all windows.
   */
  uint64_t dma_areas;
  /**
   * Conversions to private that changed a page.
   */
  uint64_t to_private;
  /**
   * Conversions to shared that changed a page.
   */
  uint64_t to_shared;
  /**
   * Conversions of a range of this block that got an error.
   */
  uint64_t failures;
  /**
   * Mappings of the block that IOMMU_IOAS_MAP_FILE made: not those that it refused, nor what is tried
   * on pages of no meaning.
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
   * Times that a conversion could not free the other plane's memory.
   */
  uint64_t release_failures;
  /**
   * VFIO_IOMMU_UNMAP_DMA calls.
   */
  uint64_t cut_calls;
  /**
   * IOMMU_VFIO_IOAS SET calls.
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
   * Huge pages that hold shared memory; 0 without hugetlb.
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
   * Huge pages that are one page now; in-place with hugetlb, else 0.
   */
  uint64_t huge_pages_whole;
  /**
   * Huge pages that the kernel has split now, since some of their pages are shared; in-place with
   * hugetlb, else 0.
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
   * Requests that `max_runs` forbade.
   */
  uint64_t runs_refused;
  /**
   * Bytes of memory that the host has lost, in either plane: see gmem_block_poison().
   */
  uint64_t bytes_poisoned;
  /**
   * Bytes of memory that pages have left and that wait to be released, in both planes: at most so much
   * is held twice for it. See gmem_block_config's `release_delay_ms`.
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
   * Requests that `max_request` forbade.
   */
  uint64_t requests_refused;
};

/**
 * Where a DMA window is to be.
 */
struct gmem_window_config {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * /dev/iommu; duplicated.
   */
  int iommufd;
  /**
   * Id of the IOAS. A device must be attached already, else the kernel's refusals come too late. It
   * has to outlive the window: the kernel gives the id of an IOAS that is destroyed to the next one,
   * and guest memory would go to the devices of that.
   */
  uint32_t ioas_id;
  /**
   * First byte of the block that it shows.
   */
  uint64_t offset;
  /**
   * Length in bytes.
   */
  uint64_t length;
  /**
   * Where devices see it. All addresses of the window are its own, also where nothing is mapped because a
   * page is private: one unmap may go across these.
   */
  uint64_t iova;
  /**
   * 1: devices may read only.
   */
  uint8_t readonly;
};

/**
 * A listener's functions; either may be NULL. They run on the thread that converts, with the range
 * locked, and must not convert, bind, add or remove windows or listeners, take QEMU's big lock, or
 * wait for somebody who does any of this.
 */
struct gmem_listener_ops {
  /**
   * sizeof this structure.
   */
  size_t struct_size;
  /**
   * `size` bytes at `offset` are about to get `attribute`: let go of them if it is GMEM_PRIVATE. 0,
   * or a negative errno that refuses the conversion; `end` is not called then.
   */
  int (*begin)(void *opaque, uint64_t offset, uint64_t size, uint32_t attribute, uint64_t sequence);
  /**
   * They have it now (`changed`), or all is as before. `sequence` is that of `begin`. Where a failed
   * conversion could not be undone as a whole, which the log says, `changed` is what lets nobody use
   * a private page: true for GMEM_PRIVATE, false for GMEM_SHARED.
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
 * What the last gmem call of this thread that failed has to say: a sentence for the user, in
 * UTF-8, without a newline. Empty if none has failed. Valid until this thread's next failing gmem
 * call, or the thread's end. Never NULL. As all calls, it may also be made in exit handlers, and in
 * destructors of thread-specific data (pthread_key_create). The sentence is made when it is asked for: to
 * name who holds a page that can't become private (EAGAIN) takes a look at all files of the process, a tenth of
 * a second for 4,000. So ask if it is to be printed, and without a lock that others wait for.
 *
 * C evaluates the arguments of one call in any order: printf("%d: %s", gmem_convert(…),
 * gmem_last_error()) may ask before there is an answer. Keep the errno in a variable first.
 */
const char *gmem_last_error(void);

/**
 * Sends the library's messages up to `max_level` (GMEM_LOG_ERROR … GMEM_LOG_TRACE) to `log`, and
 * also those of a panic, which is a bug. Once per process; without it messages are dropped.
 *
 * -EINVAL: `log` is NULL or the level unknown. -EBUSY: there is a receiver already.
 *
 * # Safety
 * `log` and `opaque` stay valid for the rest of the process, for any thread.
 */
int gmem_set_log(gmem_log_fn log, void *opaque, uint32_t max_level);

/**
 * Opens the VM behind a KVM VM file, which is duplicated: close yours whenever you like. Ends with
 * gmem_vm_free().
 *
 * -EBADF: `vm_fd` isn't open. -ENOTTY: it isn't a KVM VM. -EINVAL: `vm` is NULL.
 *
 * # Safety
 * `vm` is NULL or points to memory for a pointer, which is written on success only.
 */
int gmem_vm_new(int vm_fd, struct gmem_vm **vm);

/**
 * Ends a VM: the library's file of it is closed. NULL is fine.
 *
 * -EBUSY: it has blocks; nothing happened. -EINVAL: no such VM (any more).
 */
int gmem_vm_free(struct gmem_vm *vm);

/**
 * Lets go of a VM whose KVM file is about to be rebuilt, as on a reset of some confidential guests:
 * DMA out of all windows, bindings ended, guest_memfds closed, and the library's file of the VM.
 * Windows, listeners and blocks stay, and so do the addresses of gmem_block_host(), which can't be
 * touched now where they were a guest_memfd. Memory slots must be gone and no vCPU may run. Bytes
 * and attributes are lost. Takes bindings and every range: waits for all conversions.
 *
 * Until gmem_vm_attach(), what needs the VM fails with -EBUSY: conversions, bindings, new blocks,
 * preallocation. Blocks and windows may end, and windows come, which show nothing yet. Listeners
 * are told of pages that have another attribute than at first. Does nothing the second time.
 *
 * -EINVAL: no such VM. -EMFILE, -ENOMEM, or the errno of a window that refused to unmap: the VM is
 * attached, as before.
 */
int gmem_vm_detach(struct gmem_vm *vm);

/**
 * Gives a detached VM its new KVM file, which is duplicated: new files for all blocks, at the same
 * addresses and with the same file numbers; every page has its initial attribute; windows are filled
 * again. Whatever is at the addresses by then, such as zeros that the caller showed meanwhile, is
 * replaced. Bindings and memory slots are the caller's to make, and so is advice (madvise) on the
 * memory, whose mapping is a new one.
 *
 * -EINVAL: no such VM. -EBUSY: it isn't detached. -EBADF, -ENOTTY: `new_vm_fd` is no KVM VM.
 * -ENOTSUP: it is of another kind. -ENOMEM, …: creating, mapping or pinning failed. The
 * VM stays detached then.
 */
int gmem_vm_attach(struct gmem_vm *vm,
                   int new_vm_fd);

/**
 * Prepares the end of the process, as an exit handler does: in blocks that convert in place all
 * private bytes are lost, and with them the files' record of what is private, which the host's kernel
 * is spared to take apart (a guest can make it such that Linux 7.3 fails at that). Threads may still
 * run: memory stays mapped, and shared bytes stay what they are but in huge pages that have a private
 * part; devices keep what they reach but in blocks of huge pages. What a vCPU that still runs writes
 * to a private page between the two calls that end it goes as well, but for a moment in between host
 * threads, and who else has the file mapped, could read it: stop the vCPUs first, and no private byte
 * is ever shown. Nothing converts any more: what
 * needs the VM fails with -EBUSY. Does nothing for blocks of other kinds, nor for those with 16 private
 * runs or fewer, which no kernel fails at: their private bytes stay private, in the file. Called again, it does what it
 * could not do before, and nothing else; so does the end of each block.
 *
 * Takes the range of each block that converts in place, and waits a second for all of
 * them at most. What can't be done in a block is logged.
 *
 * -EINVAL: no such VM. -EBUSY: conversions under way did not end in time, and the files are as they
 * were; or what else was under way in some blocks did not, such as gmem_block_preallocate(), and their
 * files are. gmem_last_error() says which. Nothing converts all the same.
 */
int gmem_vm_end(struct gmem_vm *vm);

/**
 * What the kernel can do for this VM.
 *
 * -EINVAL: a NULL, a stale VM, or a `struct_size` of no version.
 *
 * # Safety
 * `probe` is NULL or points to a structure of `struct_size` bytes.
 */
int gmem_vm_probe(const struct gmem_vm *vm, struct gmem_probe *probe);

/**
 * Counts of the VM's conversion requests.
 *
 * -EINVAL: a NULL, a stale VM, or a `struct_size` of no version.
 *
 * # Safety
 * `stats` is NULL or points to a structure of `struct_size` bytes.
 */
int gmem_vm_get_stats(const struct gmem_vm *vm, struct gmem_vm_stats *stats);

/**
 * The same for the memory that the guest uses at guest physical addresses, private or shared, as when
 * KVM_RUN fails with EHWPOISON and a memory-fault exit that says where. It may cross bindings; what is no
 * memory of a block is left out. Waits for conversions around it. No memory slot may come or go meanwhile.
 *
 * -EINVAL: empty, wrapping, nothing of it is memory of a block, or no such VM. Else as
 * gmem_block_poison().
 */
int gmem_vm_poison(struct gmem_vm *vm,
                   uint64_t gpa,
                   uint64_t size);

/**
 * Serves a guest's request to make `size` bytes at `gpa` GMEM_SHARED or GMEM_PRIVATE, all of it or
 * nothing. It may cross bindings, blocks and, to shared, anything else, which is ignored and
 * counted (ignored_bytes). Pages that have the attribute already cost nothing.
 *
 * Takes the range: waits for requests that overlap, not for others, unless all together would have more than
 * 1 GiB, or the largest max_request, in both planes of split blocks: then for those before it.
 * Calls listeners with the range held. Call it without QEMU's big lock.
 *
 * -EINVAL: empty, unaligned, wrapping, against the convert-unit, to make something private that
 * can't be, or no such VM. -ENOSPC: max_runs or max_request. -ENOMEM: the library has no memory for it.
 * -ENOMEM, -EAGAIN or another errno of the kernel or a listener. -EIO: a page of it is poisoned. Attributes, backing and DMA are as they were, or where
 * undoing failed, quarantined. gmem_hypercall_result() turns the errno into what a guest may be told.
 */
int gmem_convert(struct gmem_vm *vm,
                 uint64_t gpa,
                 uint64_t size,
                 uint32_t attribute);

/**
 * A number that grows whenever a conversion ends. Read it (with acquire semantics) each time before a
 * vCPU enters KVM_RUN, and hand what was read to gmem_memory_fault() if the vCPU comes out with a memory
 * fault. Valid as long as the VM. NULL for a handle that is not a VM's.
 */
const uint64_t *gmem_vm_sequence(const struct gmem_vm *vm);

/**
 * Serves a KVM_EXIT_MEMORY_FAULT: a vCPU accessed `size` bytes at `gpa` as if they were `attribute`
 * (GMEM_PRIVATE if the exit's flags have KVM_MEMORY_EXIT_FLAG_PRIVATE). Converts them where that is what
 * the guest means; `verdict` (GMEM_FAULT_…) says what the caller is to do with the vCPU, and
 * gmem_last_error() why, unless it is GMEM_FAULT_SERVED or GMEM_FAULT_ECHO.
 *
 * `converts`: 0 if the kind of an access follows the attribute (KVM_X86_SW_PROTECTED_VM), so that a fault
 * asks for nothing; else 1. `entered`: what *gmem_vm_sequence() was before the vCPU entered KVM_RUN, or
 * UINT64_MAX for a fault that has been GMEM_FAULT_ECHO again and again.
 *
 * No memory slot may come or go meanwhile. Else as gmem_convert(): it waits for requests that overlap;
 * call it without QEMU's big lock.
 *
 * -EINVAL: no such VM, an unknown attribute or `converts`, or a NULL.
 *
 * # Safety
 * `verdict` is NULL or points to memory for its type.
 */
int gmem_memory_fault(struct gmem_vm *vm,
                      uint64_t gpa,
                      uint64_t size,
                      uint32_t attribute,
                      uint32_t converts,
                      uint64_t entered,
                      uint32_t *verdict);

/**
 * What `hypercall.ret` of a KVM_HC_MAP_GPA_RANGE exit may hold, which is 0, EINVAL or EAGAIN,
 * positive, and nothing else (kvm_is_valid_map_gpa_range_ret). `error` is 0 or the negative errno of
 * gmem_convert(). `can_retry`: not 0 if the guest takes EAGAIN for "ask again" (TDX); for others it is
 * fatal.
 */
uint64_t gmem_hypercall_result(int error,
                               uint32_t can_retry);

/**
 * Creates a block: its files and the mapping of its shared bytes. Ends with gmem_block_free(). May
 * block in the kernel; waits for a rebuild of the VM.
 *
 * The files are close-on-exec, here and after gmem_vm_attach(). The kernel makes a guest_memfd without
 * (KVM_CREATE_GUEST_MEMFD has no flag for it), and the library sets it right after: a child that
 * another thread forks in between, and that executes a program without closing what it does not know,
 * has the guest_memfd and with it the VM. So does a child that executes nothing, which also has the
 * memory: madvise(2) with MADV_DONTFORK on the addresses of gmem_block_host() keeps it from that, and
 * MADV_DONTDUMP keeps core dumps small. Neither is done here; both are to be done again after
 * gmem_vm_attach().
 *
 * A memfd's size is sealed, and so are its seals (F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_SEAL): whoever
 * gets it by gmem_block_shared_fd() can't truncate it. A guest_memfd has no seals, and a fixed size.
 *
 * -EBUSY: the VM is detached.
 * -EINVAL, -ENOTSUP: the configuration makes no sense, isn't in this version, or the kernel can't
 * serve it; the sentence says which and what to do. -ENOMEM, -EMFILE, …: creating or mapping the
 * files failed (KVM_CREATE_GUEST_MEMFD, memfd_create, mmap). Nothing is left behind.
 *
 * # Safety
 * `config` is NULL or points to a structure of `struct_size` bytes, whose `name` is NULL or a
 * NUL-terminated string and whose `policy_nodes` has `policy_words` words; `block` is NULL or points to memory for a pointer.
 */
int gmem_block_new(struct gmem_vm *vm,
                   const struct gmem_block_config *config,
                   struct gmem_block **block);

/**
 * Ends a block and frees its memory; pointers and file descriptors got from it are void. Its
 * memory slots must be gone. NULL is fine. Waits for a rebuild of the VM.
 *
 * -EBUSY: it is bound, in a DMA window or listened to; nothing happened. So it is while a window that
 * gmem_window_new() could not make can't be closed: try again. -EINVAL: no such block (any more).
 */
int gmem_block_free(struct gmem_block *block);

/**
 * Address of the block's shared bytes: `size` bytes, page aligned, valid as long as the block.
 * NULL for a handle that is not a block's. In a split block the address of a private page reads
 * and writes memory that the guest never sees: see gmem_block_check_access().
 */
void *gmem_block_host(const struct gmem_block *block);

/**
 * The file with the shared bytes, at the same offsets: for vhost-user, never for VFIO, which goes
 * by gmem_window_new(). Stays the library's: don't close it. -EINVAL: no such block.
 *
 * A process that maps it and touches a page that the guest has turned private gets SIGBUS in place,
 * and in split from a pool of huge pages that is empty: don't give it away there, if the process
 * can't bear that. In split in small pages it gets what the page left, while that is kept, and then a
 * page of zeros, which is freed after the next conversion to private.
 */
int gmem_block_shared_fd(const struct gmem_block *block);

/**
 * The file with the private bytes: the guest_memfd, for memory slots. In-place it is the file of
 * gmem_block_shared_fd(). Stays the library's: don't close it. -EINVAL: no such block.
 */
int gmem_block_private_fd(const struct gmem_block *block);

/**
 * What KVM_SET_USER_MEMORY_REGION2 needs for a slot in address space 0 that shows the block from
 * `offset` on, with KVM_MEM_GUEST_MEMFD set. Slots in other address spaces (SMM) are plain: the
 * same userspace_addr and no guest_memfd, since KVM refuses to bind an offset twice. Neither may
 * have KVM_MEM_LOG_DIRTY_PAGES or KVM_MEM_READONLY together with KVM_MEM_GUEST_MEMFD.
 *
 * -EINVAL: an unaligned offset or one beyond the block, a NULL, a stale block, a `struct_size` of
 * no version.
 *
 * # Safety
 * `slot` is NULL or points to a structure of `struct_size` bytes.
 */
int gmem_block_get_memslot(const struct gmem_block *block,
                           uint64_t offset,
                           struct gmem_memslot *slot);

/**
 * Fills the memory of every page, in the plane that its attribute selects, with `threads` threads
 * (0 counts as 1). Blocks until it is done; conversions in the block wait.
 *
 * -ENOMEM, -ENOSPC: there isn't enough; part of it is filled. -EINVAL: no such block.
 */
int gmem_block_preallocate(struct gmem_block *block, uint32_t threads);

/**
 * Gives every page its initial attribute again, for a reset of the VM; no vCPU may run. Private pages
 * that become shared lose their bytes before anybody can see them: host and devices find zeroes. In
 * place, so do the shared pages of a huge page that has a private part; all other shared pages keep
 * their bytes, and what shared ones hold that become private is undefined. Windows and the kernel
 * follow. Poisoned pages get fresh memory; those that can't are left alone, attribute included, and all
 * others are reset. Waits for conversions in the block; takes bindings and
 * range like gmem_convert(), whose errors it shares. It works in pieces and goes on where one fails, unless
 * somebody holds pages in many of them: in one that failed bytes may be gone, but no private one is shown. At last
 * devices are to have again what is shared and quarantined; what they still can't have stays so.
 */
int gmem_block_reset(struct gmem_block *block);

/**
 * Copies `size` bytes at `data` to `offset` of the block, for what a guest finds in memory at its
 * start: firmware, a kernel. In place, private pages are made shared for it and private again, also
 * if it is only a part of them that is written; what the guest then finds in them depends on the VM's
 * type: its launch commands (SNP, TDX) take the page as it is and encrypt it. All pages have their
 * attributes of before afterwards. No vCPU may run. Waits for conversions of the pages.
 *
 * -EINVAL: not in the block, empty, a NULL, or no such block. -ENOTSUP: private pages of a split
 * block, whose bytes the VMM can't reach. -EBUSY: the VM is detached. -EIO: poisoned pages. -EAGAIN:
 * somebody holds one of the pages. -ENOMEM, -ENOSPC: no memory.
 *
 * # Safety
 * `data` is NULL or points to `size` bytes, which are not the block's own.
 */
int gmem_block_place(struct gmem_block *block,
                     uint64_t offset,
                     const void *data,
                     uint64_t size);

/**
 * Frees at once the memory that pages have left and that is kept for a while (see gmem_block_config's
 * `release_delay_ms`). What can't be freed is logged, and counted in `release_failures`. Waits for
 * conversions where it is; takes no other lock of the library, and doesn't need QEMU's big lock.
 *
 * -EINVAL: no such block.
 */
int gmem_block_release_pending(struct gmem_block *block);

/**
 * Gives the memory of `size` bytes at `offset`, whole pages, back to the host, as when a guest inflates
 * a balloon or reports pages free. They keep their attributes, and who touches one next gets new
 * memory. Shared pages read zero on return. What a guest finds in a private one is for the VM's type
 * to say: zeros on KVM_X86_SW_PROTECTED_VM; on TDX and SNP the page must be accepted or validated anew,
 * so only a guest that does so may be offered this.
 *
 * Huge pages from a pool go as a whole, and those of a split block only with `no_reserve`; what else is
 * shared is zeroed and keeps its memory. In place they stay set aside for the block. Under a NUMA
 * policy, new private memory comes from where the vCPU's own policy says.
 *
 * Who has pages pinned, other than by DMA windows, keeps the old memory: don't discard beside those.
 * Works in pieces of 64 MiB, or of one huge page if that is larger: waits for conversions in each, widened
 * to whole huge pages and DMA units, and leaves all as the books say; others go on meanwhile. Takes no
 * other lock. May run with QEMU's big lock: what is zeroed and frees nothing is bounded by 32 MiB in all.
 * Listeners are not told.
 *
 * -EINVAL: empty, not page aligned, not in the block, or no such block. -EBUSY: a DMA window maps a page
 * of it, or the VM is detached. -EIO: a page is poisoned. -ENOSPC: more than 32 MiB of it would have to
 * be zeroed: ask for less, or for whole huge pages. Nothing has happened then, unless it came to that
 * between two pieces. Another errno is fallocate(2)'s. Parts of the range may be gone, attributes are as
 * before; it may be asked for again.
 */
int gmem_block_discard(struct gmem_block *block,
                       uint64_t offset,
                       uint64_t size);

/**
 * The host's hardware has lost the memory that gmem_block_host() shows for `size` bytes at `offset`, as a
 * SIGBUS says: of whole pages around them. In a split block that is shared memory, also behind pages that
 * are private now, which stay usable. No device reaches lost pages any more, conversions that include one,
 * or would lead to one, get -EIO, so do gmem_max_order() and gmem_block_check_access(), and preallocation
 * leaves them out, until gmem_block_reset() has given them fresh memory or the VM is rebuilt. Twice is as
 * good as once. Waits for conversions in the block.
 *
 * -EINVAL: empty or not in the block, or no such block. -EBUSY: the VM is detached. Another errno: a
 * DMA window refused to let go of them, or to take back what had to leave it for a moment, which is
 * quarantined then; they are poisoned all the same.
 */
int gmem_block_poison(struct gmem_block *block,
                      uint64_t offset,
                      uint64_t size);

/**
 * State and counts of a block.
 *
 * -EINVAL: a NULL, a stale block, or a `struct_size` of no version.
 *
 * # Safety
 * `stats` is NULL or points to a structure of `struct_size` bytes.
 */
int gmem_block_get_stats(const struct gmem_block *block, struct gmem_block_stats *stats);

/**
 * The attribute (GMEM_SHARED or GMEM_PRIVATE) of the page at `offset`, and the offset at which
 * the run of pages with that attribute ends, exclusive. Right at this moment: a conversion may
 * follow at once, unless the caller is a listener and its range is asked for.
 *
 * -EINVAL: an offset beyond the block, a NULL, a stale block.
 *
 * # Safety
 * `end` and `attribute` are NULL or point to memory for their types.
 */
int gmem_block_get_run(const struct gmem_block *block,
                       uint64_t offset,
                       uint64_t *end,
                       uint32_t *attribute);

/**
 * How large a mapping may be that holds the page at `offset` and pages of one attribute only: log2
 * of the pages in the largest naturally aligned range of the block around it. Right at this
 * moment, unless the caller is a listener and asks about its range. Takes no lock that a conversion
 * holds while it waits.
 *
 * -EINVAL: an offset beyond the block, a NULL, a stale block. -EIO: the page is poisoned.
 *
 * # Safety
 * `order` is NULL or points to memory for its type.
 */
int gmem_max_order(const struct gmem_block *block, uint64_t offset, uint32_t *order);

/**
 * Asks before the VMM touches `size` bytes at `offset` of gmem_block_host(). 0: all of them are
 * shared, at this moment. Costs a look-up and one atomic load while the block has no private page.
 *
 * -EACCES: a page is private; it is counted (access_refused). -EIO: a page is poisoned. -EINVAL:
 * beyond the block, or no such block.
 */
int gmem_block_check_access(const struct gmem_block *block, uint64_t offset, uint64_t size);

/**
 * Shows `size` bytes of a block from `offset` at `gpa` and tells the kernel their attributes. The
 * memory slot may exist or follow: KVM keeps attributes by address. Waits for conversions of these pages.
 *
 * -EINVAL: a range that is empty, unaligned, wrapping or not in the block, or no such block.
 * -EEXIST: an address or an offset is bound already. -ENOMEM: KVM_SET_MEMORY_ATTRIBUTES, also of what
 * an earlier gmem_unbind() left private there. Nothing is bound then.
 */
int gmem_bind(struct gmem_block *block,
              uint64_t offset,
              uint64_t size,
              uint64_t gpa);

/**
 * Ends a binding, given exactly as it was made. Its memory slot must be gone: for KVM the addresses
 * are shared afterwards, and a vCPU would find shared memory where it left a private page.
 * Waits for conversions of these pages.
 *
 * -EINVAL: there is no such binding or block. -ENOMEM: KVM_SET_MEMORY_ATTRIBUTES failed; the
 * binding has ended, but the kernel still holds its addresses for private, and a vCPU finds no memory
 * there. gmem_bind() over them makes them shared before all else.
 */
int gmem_unbind(struct gmem_block *block,
                uint64_t offset,
                uint64_t size,
                uint64_t gpa);

/**
 * Makes a new IOAS fit for windows that are cut (GMEM_STRATEGY_CUT): its mappings are single pages in
 * the IOMMU, so that any part of one can be unmapped by itself. To be called between IOMMU_IOAS_ALLOC
 * and the first mapping. Takes no lock.
 *
 * -EBADF: `iommufd` isn't open. -ENOTTY: it is no iommufd. -ENOENT: no such IOAS. -EINVAL: too late,
 * devices and mappings are there. Then nothing changed, and windows take another strategy.
 */
int gmem_ioas_prepare(int iommufd,
                      uint32_t ioas_id);

/**
 * Shows a part of a block to the devices of an IOAS: all of its shared pages, now and after every
 * conversion. Ends with gmem_window_free(). Takes the window's range: waits for conversions in it.
 * Pins memory, which the kernel counts against RLIMIT_MEMLOCK.
 *
 * -EINVAL: a range that makes no sense, or that the IOAS reserves, a NULL, a stale block. -EBADF:
 * `iommufd` isn't open. -ENOTTY: it is no iommufd. -ENOENT: no such IOAS. -EEXIST: the IOAS has something
 * there, where pages are shared; elsewhere a conversion finds that out. -ENOTSUP: `dma=fd` or
 * `dma-split=cut` and the kernel can't. -ENOMEM: pinning. Nothing is mapped then; should the kernel refuse
 * to take back what was, which is logged, these pages can't become private, and the block's next window
 * and gmem_block_free() try again.
 *
 * # Safety
 * `config` is NULL or points to a structure of `struct_size` bytes; `window` is NULL or points to
 * memory for a pointer.
 */
int gmem_window_new(struct gmem_block *block,
                    const struct gmem_window_config *config,
                    struct gmem_window **window);

/**
 * Makes a window show another part of its block: what both parts have in common stays mapped all
 * the time, except where it is one kernel area with what goes. `config` has the IOAS, the access
 * and, for each offset, the iova of before; its iommufd is not looked at. Takes both ranges: waits
 * for conversions in them.
 *
 * -EINVAL: `config` differs in more than the range, a NULL, or no such window. Else as
 * gmem_window_new(). The window shows what it showed before, or, if the kernel refused to unmap,
 * both parts. What it can't show again is quarantined (bytes_quarantined), and tried again when the
 * window is reshaped or the block reset; in a confidential VM also when it converts.
 *
 * # Safety
 * `config` is NULL or points to a structure of `struct_size` bytes.
 */
int gmem_window_reshape(struct gmem_window *window, const struct gmem_window_config *config);

/**
 * Ends a window: unmaps all of it and closes the library's iommufd. NULL is fine. Takes the
 * window's range: waits for conversions in it.
 *
 * An IOAS that has been destroyed has nothing mapped: that is no error.
 *
 * -EINVAL: no such window (any more). Another errno: the kernel refused to unmap; the window stays,
 * takes nothing in any more, and its pages can't become private. Try again.
 */
int gmem_window_free(struct gmem_window *window);

/**
 * Tells `ops` of every conversion of the block from now on. Ends with gmem_listener_remove().
 *
 * -EINVAL: a NULL, a stale block, or a `struct_size` of no version.
 *
 * # Safety
 * `ops` is NULL or points to a structure of `struct_size` bytes, which is copied; its functions
 * and `opaque` stay valid, for any thread, until gmem_listener_remove() has returned. `listener`
 * is NULL or points to memory for a pointer.
 */
int gmem_listener_add(struct gmem_block *block,
                      const struct gmem_listener_ops *ops,
                      void *opaque,
                      struct gmem_listener **listener);

/**
 * Ends a registration; no call of it is under way when this returns, so it must not be called from
 * one. NULL is fine. -EINVAL: no such listener (any more).
 */
int gmem_listener_remove(struct gmem_listener *listener);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* GMEM_H */
