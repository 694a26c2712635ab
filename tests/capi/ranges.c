/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A block's memory, where it is bound, and what a guest may ask to convert. */
#include "harness.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK (16 * PAGE)

struct range {
    uint64_t start;
    uint64_t size;
};

/* Empty, unaligned or wrapping: ranges of nothing. */
static const struct range senseless[] = {
    { 0, 0 },
    { PAGE, 0 },
    { 1, PAGE },
    { 0, 1 },
    { 0, PAGE - 1 },
    { 0, PAGE + 1 },
    { PAGE / 2, PAGE / 2 },
    { PAGE, UINT64_MAX },
    { UINT64_MAX, 1 },
    { UINT64_MAX, PAGE },
    { 0 - PAGE, PAGE },
    { 0 - PAGE, 2 * PAGE },
    { PAGE, 0 - PAGE },
    { 1ull << 63, 1ull << 63 },
};

/* Well-formed, but not in a block of BLOCK bytes. */
static const struct range outside[] = {
    { 0, BLOCK + PAGE },
    { PAGE, BLOCK },
    { BLOCK, PAGE },
    { BLOCK - PAGE, 2 * PAGE },
    { 1ull << 40, PAGE },
    { 0, 0 - PAGE },
};

#define COUNT(array) (sizeof(array) / sizeof *(array))

static void memory_is_zero_and_the_same_by_every_name(void)
{
    struct gmem_memslot slot = memslot();
    struct gmem_block *block;
    struct stat shared;
    struct stat private_file;
    uint64_t *host;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    host = (uint64_t *)gmem_block_host(block);
    EQUAL((uintptr_t)host % 4096, 0);
    EQUAL(host[0], 0);
    EQUAL(host[BLOCK / sizeof *host - 1], 0);
    host[PAGE / sizeof *host] = 0x1122334455667788;
    OK(gmem_block_get_memslot(block, PAGE, &slot));
    CHECK((char *)slot.userspace_addr == (char *)host + PAGE);
    EQUAL(slot.guest_memfd_offset, PAGE);
    EQUAL(slot.guest_memfd, gmem_block_private_fd(block));
    EQUAL(*(uint64_t *)slot.userspace_addr, 0x1122334455667788);
    EQUAL(gmem_block_shared_fd(block), gmem_block_private_fd(block));
    CHECK(fstat(gmem_block_shared_fd(block), &shared) == 0);
    CHECK(fstat(slot.guest_memfd, &private_file) == 0);
    EQUAL(shared.st_size, BLOCK);
    EQUAL(shared.st_ino, private_file.st_ino);
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void a_memslot_begins_at_a_page_of_the_block(void)
{
    static const uint64_t bad[] = { 1, PAGE - 1, PAGE + 1, BLOCK, BLOCK + PAGE, 1ull << 63,
                                    UINT64_MAX, 0 - PAGE };
    struct gmem_memslot slot = memslot();
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    for (size_t i = 0; i < COUNT(bad); i++) {
        FAILS(gmem_block_get_memslot(block, bad[i], &slot), EINVAL, "ram7: ");
        CHECK(slot.userspace_addr == NULL);
    }
    OK(gmem_block_get_memslot(block, BLOCK - PAGE, &slot));
    EQUAL(slot.guest_memfd_offset, BLOCK - PAGE);
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void senseless_bindings_are_refused(void)
{
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    for (size_t i = 0; i < COUNT(senseless); i++) {
        const struct range bad = senseless[i];

        FAILS(gmem_bind(block, bad.start, bad.size, 0), EINVAL, "ram7: ");
        FAILS(gmem_unbind(block, bad.start, bad.size, 0), EINVAL, "ram7: ");
        if (bad.size == PAGE || bad.size == 2 * PAGE) {
            FAILS(gmem_bind(block, 0, bad.size, bad.start), EINVAL, "ram7: ");
            FAILS(gmem_unbind(block, 0, bad.size, bad.start), EINVAL, "ram7: ");
        }
    }
    for (size_t i = 0; i < COUNT(outside); i++) {
        FAILS(gmem_bind(block, outside[i].start, outside[i].size, 0), EINVAL, "not in its 0x10000");
    }
    /* Each in its own words. */
    FAILS(gmem_bind(block, 0, 0, 0), EINVAL, "0x0 bytes at offset 0x0 are none");
    FAILS(gmem_bind(block, 0, PAGE, 1), EINVAL, "bound at gpa 0x1: they are not whole pages of 4096");
    FAILS(gmem_bind(block, 0, PAGE, 0 - PAGE), EINVAL,
          "bound at gpa 0xfffffffffffff000: they reach the end of the 64-bit address space");
    FAILS(gmem_convert(vm.handle, 0 - PAGE, PAGE, GMEM_SHARED), EINVAL,
          "0x1000 bytes at gpa 0xfffffffffffff000 reach the end of the 64-bit address space");
    EQUAL(block_stats(block).bindings, 0);
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void addresses_and_offsets_are_bound_once(void)
{
    struct gmem_block *block;
    struct gmem_block *other;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    other = block_new(&vm, "other", BLOCK);
    OK(gmem_bind(block, 0, 4 * PAGE, MIB));
    FAILS(gmem_bind(block, 0, 4 * PAGE, MIB), EEXIST, "ram7: ");
    FAILS(gmem_bind(block, 3 * PAGE, PAGE, 16 * MIB), EEXIST, "ram7: offset 0x3000..0x4000");
    FAILS(gmem_bind(other, 0, PAGE, MIB + 3 * PAGE), EEXIST, "other: gpa 0x103000..0x104000");
    FAILS(gmem_bind(other, 0, 2 * PAGE, MIB - PAGE), EEXIST, "other: gpa");
    /* Neighbours, and the rest of the block elsewhere, are fine. */
    OK(gmem_bind(other, 0, PAGE, MIB - PAGE));
    OK(gmem_bind(other, PAGE, PAGE, MIB + 4 * PAGE));
    OK(gmem_bind(block, 4 * PAGE, 12 * PAGE, 0x100000000));
    EQUAL(block_stats(block).bindings, 2);
    EQUAL(block_stats(other).bindings, 2);

    OK(gmem_unbind(block, 0, 4 * PAGE, MIB));
    OK(gmem_bind(block, 0, 4 * PAGE, 16 * MIB));
    OK(gmem_unbind(block, 0, 4 * PAGE, 16 * MIB));
    OK(gmem_unbind(block, 4 * PAGE, 12 * PAGE, 0x100000000));
    OK(gmem_unbind(other, 0, PAGE, MIB - PAGE));
    OK(gmem_unbind(other, PAGE, PAGE, MIB + 4 * PAGE));
    OK(gmem_block_free(block));
    OK(gmem_block_free(other));
    vm_close(&vm);
}

static void only_what_is_bound_can_be_unbound(void)
{
    struct gmem_block *block;
    struct gmem_block *other;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    other = block_new(&vm, "other", BLOCK);
    FAILS(gmem_unbind(block, 0, PAGE, 0), EINVAL, "ram7: offset 0x0..0x1000 isn't bound");
    OK(gmem_bind(block, 0, 4 * PAGE, MIB));
    FAILS(gmem_unbind(block, 0, 4 * PAGE, 2 * MIB), EINVAL, "isn't bound at gpa");
    FAILS(gmem_unbind(block, 0, 3 * PAGE, MIB), EINVAL, "isn't bound");
    FAILS(gmem_unbind(block, PAGE, 3 * PAGE, MIB + PAGE), EINVAL, "isn't bound");
    FAILS(gmem_unbind(block, 0, 5 * PAGE, MIB), EINVAL, "isn't bound");
    FAILS(gmem_unbind(other, 0, 4 * PAGE, MIB), EINVAL, "other: ");
    EQUAL(block_stats(block).bindings, 1);
    OK(gmem_unbind(block, 0, 4 * PAGE, MIB));
    FAILS(gmem_unbind(block, 0, 4 * PAGE, MIB), EINVAL, "isn't bound");
    OK(gmem_block_free(block));
    OK(gmem_block_free(other));
    vm_close(&vm);
}

static void senseless_conversions_are_refused_and_counted(void)
{
    uint64_t failures = 0;
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    OK(gmem_bind(block, 0, BLOCK, 0));
    for (size_t i = 0; i < COUNT(senseless); i++) {
        const struct range bad = senseless[i];

        for (uint32_t attribute = GMEM_SHARED; attribute <= GMEM_PRIVATE; attribute++) {
            FAILS(gmem_convert(vm.handle, bad.start, bad.size, attribute), EINVAL, "at gpa ");
            failures++;
        }
    }
    EQUAL(vm_stats(vm.handle).requests, failures);
    EQUAL(vm_stats(vm.handle).failures, failures);
    FAILS(gmem_convert(vm.handle, 0, PAGE, 2), EINVAL, "2 is no attribute");
    FAILS(gmem_convert(vm.handle, 0, PAGE, UINT32_MAX), EINVAL, "is no attribute");
    EQUAL(vm_stats(vm.handle).requests, failures + 2);
    EQUAL(vm_stats(vm.handle).failures, failures + 2);
    EQUAL(block_stats(block).attribute_calls, 0);
    OK(gmem_unbind(block, 0, BLOCK, 0));
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void nothing_of_an_ordinary_vm_becomes_private(void)
{
    struct gmem_block_stats stats;
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    OK(gmem_bind(block, 0, BLOCK, MIB));
    memset(gmem_block_host(block), 0xa5, BLOCK);
    FAILS(gmem_convert(vm.handle, MIB, PAGE, GMEM_PRIVATE), EINVAL, "ram7: it belongs to an ordin");
    FAILS(gmem_convert(vm.handle, MIB, BLOCK, GMEM_PRIVATE), EINVAL, "ram7: ");
    OK(gmem_convert(vm.handle, MIB, BLOCK, GMEM_SHARED));
    stats = block_stats(block);
    EQUAL(stats.backing, GMEM_BACKING_IN_PLACE);
    EQUAL(stats.bytes_shared, BLOCK);
    EQUAL(stats.bytes_private, 0);
    EQUAL(stats.runs, 0);
    EQUAL(stats.to_private, 0);
    EQUAL(stats.failures, 2);
    EQUAL(stats.attribute_calls, 0);
    EQUAL(((unsigned char *)gmem_block_host(block))[BLOCK - 1], 0xa5);
    OK(gmem_unbind(block, 0, BLOCK, MIB));
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void holes_are_shared_already_and_never_private(void)
{
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    FAILS(gmem_convert(vm.handle, 0, PAGE, GMEM_PRIVATE), EINVAL, "no memory that can be private");
    OK(gmem_convert(vm.handle, 0, PAGE, GMEM_SHARED));
    EQUAL(vm_stats(vm.handle).ignored_bytes, PAGE);
    block = block_new(&vm, "ram7", BLOCK);
    OK(gmem_bind(block, 0, BLOCK, MIB));
    OK(gmem_convert(vm.handle, MIB - PAGE, BLOCK + 2 * PAGE, GMEM_SHARED));
    EQUAL(vm_stats(vm.handle).ignored_bytes, 3 * PAGE);
    FAILS(gmem_convert(vm.handle, MIB - PAGE, 2 * PAGE, GMEM_PRIVATE), EINVAL, "0x1000 bytes of");
    /* As huge as a request can be. */
    FAILS(gmem_convert(vm.handle, 0, 0 - PAGE, GMEM_PRIVATE), EINVAL, "can be private");
    OK(gmem_convert(vm.handle, 0, 0 - PAGE, GMEM_SHARED));
    OK(gmem_unbind(block, 0, BLOCK, MIB));
    OK(gmem_block_free(block));
    FAILS(gmem_convert(vm.handle, MIB, PAGE, GMEM_PRIVATE), EINVAL, "no memory");
    vm_close(&vm);
}

static void a_run_is_found_from_any_offset_in_the_block(void)
{
    static const uint64_t good[] = { 0, 1, PAGE, BLOCK - 1 };
    static const uint64_t bad[] = { BLOCK, BLOCK + 1, 1ull << 63, UINT64_MAX };
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    for (size_t i = 0; i < COUNT(good); i++) {
        uint32_t attribute = 7;
        uint64_t end = 7;

        OK(gmem_block_get_run(block, good[i], &end, &attribute));
        EQUAL(attribute, GMEM_SHARED);
        EQUAL(end, BLOCK);
        OK(gmem_max_order(block, good[i], &attribute));
        EQUAL(attribute, 4);
    }
    for (size_t i = 0; i < COUNT(bad); i++) {
        uint32_t attribute = 7;
        uint64_t end = 7;

        FAILS(gmem_block_get_run(block, bad[i], &end, &attribute), EINVAL, "ram7: offset");
        FAILS(gmem_max_order(block, bad[i], &attribute), EINVAL, "ram7: offset");
        CHECK(end == 7 && attribute == 7);
    }
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void access_ends_with_the_block(void)
{
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    OK(gmem_block_check_access(block, 0, BLOCK));
    OK(gmem_block_check_access(block, 1, 1));
    OK(gmem_block_check_access(block, BLOCK - 1, 1));
    OK(gmem_block_check_access(block, PAGE - 1, 2));
    FAILS(gmem_block_check_access(block, BLOCK, 1), EINVAL, "ram7: ");
    FAILS(gmem_block_check_access(block, BLOCK - 1, 2), EINVAL, "ram7: ");
    FAILS(gmem_block_check_access(block, 1, UINT64_MAX), EINVAL, "ram7: ");
    FAILS(gmem_block_check_access(block, UINT64_MAX, 1), EINVAL, "ram7: ");
    EQUAL(block_stats(block).access_refused, 0);
    OK(gmem_block_free(block));
    vm_close(&vm);
}

/* cachestat(2): pages that have memory, cleared already or not yet. A kernel may be built without. */
static bool has_pages(const struct gmem_block *block, uint64_t pages)
{
    const uint64_t range[2] = { 0, 0 };
    uint64_t found[5] = { 0, 0, 0, 0, 0 };

    if (syscall(451, gmem_block_shared_fd(block), range, found, 0) != 0) {
        return CHECK(errno == ENOSYS);
    }
    return EQUAL(found[0], pages);
}

static void preallocation_takes_any_number_of_threads(void)
{
    static const uint32_t threads[] = { 0, 1, 2, 64, UINT32_MAX };
    /* More than one thread's piece of work, the last one short. */
    const uint64_t size = 160 * MIB;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    for (size_t i = 0; i < COUNT(threads); i++) {
        struct gmem_block *block = block_new(&vm, "ram7", size);

        CHECK(has_pages(block, 0));
        OK(gmem_block_preallocate(block, threads[i]));
        CHECK(has_pages(block, size / PAGE));
        OK(gmem_block_preallocate(block, threads[i]));
        OK(gmem_block_free(block));
    }
    vm_close(&vm);
}

static void a_reset_keeps_what_need_not_change(void)
{
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    OK(gmem_bind(block, 0, PAGE, 0));
    memset(gmem_block_host(block), 0x5a, BLOCK);
    OK(gmem_block_reset(block));
    EQUAL(((unsigned char *)gmem_block_host(block))[PAGE], 0x5a);
    EQUAL(block_stats(block).attribute_calls, 0);
    OK(gmem_unbind(block, 0, PAGE, 0));
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void what_is_placed_is_in_the_guests_memory(void)
{
    static const char text[] = "firmware";
    struct gmem_block *block;
    const char *host;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    host = (const char *)gmem_block_host(block);
    /* Across the end of a page. */
    OK(gmem_block_place(block, PAGE - 4, text, sizeof text));
    CHECK(memcmp(host + PAGE - 4, text, sizeof text) == 0);
    OK(gmem_block_place(block, BLOCK - sizeof text, text, sizeof text));
    CHECK(memcmp(host + BLOCK - sizeof text, text, sizeof text) == 0);
    FAILS(gmem_block_place(block, 0, NULL, PAGE), EINVAL, "placed is NULL");
    FAILS(gmem_block_place(block, 0, text, 0), EINVAL, "ram7: 0x0 bytes at offset 0x0 are none");
    FAILS(gmem_block_place(block, BLOCK - 1, text, 2), EINVAL, "ram7: 0x2 bytes at offset 0xffff");
    FAILS(gmem_block_place(block, 0, text, UINT64_MAX), EINVAL, "ram7: ");
    FAILS(gmem_block_place(block, UINT64_MAX, text, 1), EINVAL, "ram7: ");
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void what_is_discarded_reads_zero(void)
{
    struct gmem_block *block;
    char *host;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    host = (char *)gmem_block_host(block);
    OK(gmem_bind(block, 0, BLOCK, MIB));
    for (uint64_t at = 0; at < 4 * PAGE; at += PAGE) {
        host[at] = 7;
    }
    FAILS(gmem_block_discard(block, 0, 0), EINVAL, "ram7: ");
    FAILS(gmem_block_discard(block, 1, PAGE), EINVAL, "ram7: ");
    FAILS(gmem_block_discard(block, 0, PAGE + 1), EINVAL, "ram7: ");
    FAILS(gmem_block_discard(block, BLOCK, PAGE), EINVAL, "ram7: ");
    FAILS(gmem_block_discard(block, PAGE, UINT64_MAX), EINVAL, "ram7: ");
    OK(gmem_block_poison(block, 3 * PAGE, 1));
    FAILS(gmem_block_discard(block, 2 * PAGE, 2 * PAGE), EIO, "poisoned");
    OK(gmem_block_discard(block, PAGE, PAGE));
    EQUAL(host[0], 7);
    EQUAL(host[PAGE], 0);
    EQUAL(host[2 * PAGE], 7);
    EQUAL(block_stats(block).bytes_shared, BLOCK);
    OK(gmem_unbind(block, 0, BLOCK, MIB));
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void poisoned_pages_are_out_of_use_until_a_reset(void)
{
    struct gmem_block *block;
    uint32_t order;
    char *host;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    host = (char *)gmem_block_host(block);
    host[PAGE] = 7;
    host[2 * PAGE] = 8;
    OK(gmem_bind(block, 0, BLOCK, MIB));
    FAILS(gmem_vm_poison(vm.handle, 0, PAGE), EINVAL, "no memory of a block");
    FAILS(gmem_vm_poison(vm.handle, MIB, 0), EINVAL, "empty");
    FAILS(gmem_vm_poison(vm.handle, UINT64_MAX, 2), EINVAL, "wrap");
    FAILS(gmem_block_poison(block, BLOCK, 1), EINVAL, "ram7: ");
    FAILS(gmem_block_poison(block, 0, 0), EINVAL, "ram7: ");
    EQUAL(block_stats(block).bytes_poisoned, 0);
    OK(gmem_vm_poison(vm.handle, MIB + PAGE + 5, 1));
    OK(gmem_block_poison(block, PAGE, 1));
    EQUAL(block_stats(block).bytes_poisoned, PAGE);
    FAILS(gmem_block_check_access(block, 2 * PAGE - 1, 2), EIO, "poisoned");
    OK(gmem_block_check_access(block, 2 * PAGE, PAGE));
    FAILS(gmem_max_order(block, PAGE, &order), EIO, "poisoned");
    OK(gmem_max_order(block, 2 * PAGE, &order));
    EQUAL(order, 1);
    FAILS(gmem_convert(vm.handle, MIB, BLOCK, GMEM_SHARED), EIO, "poisoned");
    FAILS(gmem_block_place(block, PAGE, "x", 1), EIO, "poisoned");
    OK(gmem_block_preallocate(block, 1));
    OK(gmem_block_reset(block));
    EQUAL(block_stats(block).bytes_poisoned, 0);
    OK(gmem_block_check_access(block, 0, BLOCK));
    EQUAL(host[PAGE], 0);
    EQUAL(host[2 * PAGE], 8);
    OK(gmem_unbind(block, 0, BLOCK, MIB));
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void what_needs_nothing_of_a_vm_works_at_its_end(void)
{
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    OK(gmem_bind(block, 0, BLOCK, MIB));
    OK(gmem_vm_end(vm.handle));
    FAILS(gmem_convert(vm.handle, MIB, PAGE, GMEM_SHARED), EBUSY, "at its end");
    FAILS(gmem_vm_detach(vm.handle), EBUSY, "at its end");
    FAILS(gmem_vm_attach(vm.handle, vm.fd), EBUSY, "at its end");
    OK(gmem_block_reset(block));
    OK(gmem_block_release_pending(block));
    OK(gmem_block_check_access(block, 0, BLOCK));
    OK(gmem_unbind(block, 0, BLOCK, MIB));
    OK(gmem_block_free(block));
    vm_close(&vm);
}

const struct test_case range_cases[] = {
    CASE(memory_is_zero_and_the_same_by_every_name),
    CASE(a_memslot_begins_at_a_page_of_the_block),
    CASE(senseless_bindings_are_refused),
    CASE(addresses_and_offsets_are_bound_once),
    CASE(only_what_is_bound_can_be_unbound),
    CASE(senseless_conversions_are_refused_and_counted),
    CASE(nothing_of_an_ordinary_vm_becomes_private),
    CASE(holes_are_shared_already_and_never_private),
    CASE(a_run_is_found_from_any_offset_in_the_block),
    CASE(access_ends_with_the_block),
    CASE(preallocation_takes_any_number_of_threads),
    CASE(a_reset_keeps_what_need_not_change),
    CASE(what_is_placed_is_in_the_guests_memory),
    CASE(what_is_discarded_reads_zero),
    CASE(poisoned_pages_are_out_of_use_until_a_reset),
    CASE(what_needs_nothing_of_a_vm_works_at_its_end),
    END_OF_CASES,
};
