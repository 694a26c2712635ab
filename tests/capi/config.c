/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Every property of a new block, and what a refused one leaves: nothing. */
#include "harness.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

/* The configuration is refused, by this errno and in these words. */
#define REFUSED(config, error, part) refused(&vm, &(config), (error), (part), __LINE__)

static void refused(const struct vm *vm, const struct gmem_block_config *config, int error,
                    const char *part, int line)
{
    struct gmem_block *block = NULL;

    check_error(gmem_block_new(vm->handle, config, &block), error, part, "gmem_block_new",
                __FILE__, line);
    check(block == NULL, "no handle of a refused block", __FILE__, line);
}

static void accepted(const struct vm *vm, const struct gmem_block_config *config)
{
    struct gmem_block *block = NULL;

    OK(gmem_block_new(vm->handle, config, &block));
    EQUAL(block_stats(block).size, config->size);
    OK(gmem_block_free(block));
}

static void sizes_that_make_no_sense_are_refused(void)
{
    static const struct {
        uint64_t size;
        const char *why;
    } sizes[] = {
        { 0, "0x0 bytes is no memory" },
        { 1, "0x1 bytes is not a multiple of 4096" },
        { 512, "0x200 bytes is not a multiple of 4096" },
        { PAGE - 1, "0xfff bytes is not a multiple of 4096" },
        { PAGE + 1, "0x1001 bytes is not a multiple of 4096" },
        { UINT64_MAX, "0xffffffffffffffff bytes is not a multiple of 4096" },
        { 1ull << 63, "0x8000000000000000 bytes is more than a file can have (0x7ffffffffffff000)" },
        { UINT64_MAX - PAGE + 1, "0xfffffffffffff000 bytes is more than a file can have" },
    };
    struct vm vm;

    if (!vm_open(&vm)) {
        return;
    }
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct gmem_block_config config = block_config(sizes[i].size);
        char text[128];

        snprintf(text, sizeof text, "ram7: a size of %s", sizes[i].why);
        REFUSED(config, EINVAL, text);
        config.confidential = 1;
        REFUSED(config, EINVAL, text);
    }
    vm_close(&vm);
}

/* What a first program writes: nothing but the size has to be set. */
static void a_structure_of_zeros_is_an_ordinary_block(void)
{
    struct gmem_block_config config;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.size = MIB;
    accepted(&vm, &config);
    vm_close(&vm);
}

static void sizes_without_room_leave_nothing(void)
{
    struct gmem_block_config config = block_config(1ull << 50);
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    REFUSED(config, ENOMEM, "ram7: mapping its 0x4000000000000 shared bytes: mmap");
    config.size = (1ull << 63) - PAGE;
    REFUSED(config, ENOMEM, "ram7: mapping its");
    vm_close(&vm);
}

static void what_this_version_lacks_is_refused_by_name(void)
{
    struct gmem_block_config config;
    struct vm vm;

    if (!vm_open(&vm)) {
        return;
    }
    for (uint8_t confidential = 0; confidential < 2; confidential++) {
        const struct gmem_block_config plain = block_config(PAGE);

        config = plain;
        config.confidential = confidential;
        config.dma_unit = 3 * PAGE;
        REFUSED(config, EINVAL, "ram7: a dma-unit of 0x3000 bytes");
        config.dma_unit = PAGE;
        config.dma_split = GMEM_DMA_SPLIT_CUT;
        REFUSED(config, EINVAL, "ram7: dma-unit is for dma-split=unit");
        config.dma_split = GMEM_DMA_SPLIT_AUTO;
        config.dma_unit = 0;
        config.no_direct_map = 1;
        REFUSED(config, ENOTSUP, "ram7: direct-map=off needs a kernel");
        config.no_direct_map = 0;
    }
    vm_close(&vm);
}

static void huge_pages_that_can_not_be_are_refused_by_name(void)
{
    struct gmem_block_config config = block_config(4 * MIB);
    struct vm vm;

    if (!vm_open(&vm)) {
        return;
    }
    config.hugetlb_size = 2 * MIB;
    REFUSED(config, EINVAL, "ram7: hugetlbsize says nothing without hugetlb");
    config.hugetlb = 1;
    REFUSED(config, ENOTSUP, "ram7: hugetlb is for confidential VMs");
    config.confidential = 1;
    config.hugetlb_size = 4 * MIB;
    REFUSED(config, EINVAL, "ram7: a hugetlbsize of 0x400000 bytes is neither 2 MiB nor 1 GiB");
    config.hugetlb_size = 0;
    config.size = 3 * MIB;
    REFUSED(config, EINVAL, "ram7: a size of 0x300000 bytes is not a multiple of hugetlbsize, 2 MiB");
    vm_close(&vm);
}

static void policies_that_can_not_be_are_refused_by_name(void)
{
    static const uint64_t first_node[] = { 1 };
    static const uint64_t no_node[] = { 0, 0 };
    static const uint64_t far_node[] = { 0, 1ull << 62 };
    static const uint32_t modes[] = {
        GMEM_POLICY_PREFERRED, GMEM_POLICY_BIND, GMEM_POLICY_INTERLEAVE,
    };
    struct gmem_block_config config = block_config(MIB);
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    config.policy_words = 1;
    REFUSED(config, EINVAL, "policy_nodes is NULL and policy_words 1");
    config.policy_nodes = first_node;
    REFUSED(config, EINVAL, "ram7: host-nodes says nothing with policy=default");
    config.policy_mode = 4;
    REFUSED(config, EINVAL, "ram7: 4 is no known value of policy");
    config.policy_words = 17;
    REFUSED(config, EINVAL, "policy_words is 17, more than any kernel has nodes for");
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        config.policy_mode = modes[i];
        config.policy_nodes = no_node;
        config.policy_words = 2;
        REFUSED(config, EINVAL, "ram7: a policy other than default needs host-nodes");
        config.policy_words = 0;
        REFUSED(config, EINVAL, "ram7: a policy other than default needs host-nodes");
        config.policy_nodes = far_node;
        config.policy_words = 2;
        REFUSED(config, EINVAL, "over NUMA nodes 126");
        config.policy_nodes = first_node;
        config.policy_words = 1;
        accepted(&vm, &config);
    }
    vm_close(&vm);
}

static void unknown_values_are_refused_by_name(void)
{
    static const uint32_t unknown[] = { 4, 99, UINT32_MAX };
    struct vm vm;

    if (!vm_open(&vm)) {
        return;
    }
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        struct gmem_block_config config = block_config(PAGE);
        char text[64];

        config.backing = unknown[i];
        snprintf(text, sizeof text, "ram7: %u is no known value of backing", unknown[i]);
        REFUSED(config, EINVAL, text);
        config = block_config(PAGE);
        config.initial = unknown[i];
        snprintf(text, sizeof text, "ram7: %u is no known value of initial", unknown[i]);
        REFUSED(config, EINVAL, text);
        config = block_config(PAGE);
        config.dma = unknown[i];
        snprintf(text, sizeof text, "ram7: %u is no known value of dma", unknown[i]);
        REFUSED(config, EINVAL, text);
        config = block_config(PAGE);
        config.dma_split = unknown[i];
        snprintf(text, sizeof text, "ram7: %u is no known value of dma-split", unknown[i]);
        REFUSED(config, EINVAL, text);
    }
    vm_close(&vm);
}

/* What nobody set, or another language wrote: no byte is neither yes nor no. */
static void switches_that_are_neither_0_nor_1_are_refused_by_name(void)
{
    static const struct {
        const char *name;
        size_t offset;
    } switches[] = {
        { "confidential", offsetof(struct gmem_block_config, confidential) },
        { "no_reserve", offsetof(struct gmem_block_config, no_reserve) },
        { "hugetlb", offsetof(struct gmem_block_config, hugetlb) },
        { "no_direct_map", offsetof(struct gmem_block_config, no_direct_map) },
    };
    static const unsigned char bad[] = { 2, 3, 0x80, 0xff };
    struct vm vm;

    if (!vm_open(&vm)) {
        return;
    }
    for (size_t i = 0; i < sizeof switches / sizeof *switches; i++) {
        for (size_t j = 0; j < sizeof bad; j++) {
            struct gmem_block_config config = block_config(PAGE);
            char text[64];

            memset((char *)&config + switches[i].offset, bad[j], 1);
            snprintf(text, sizeof text, "ram7: %s is %u, neither 0 nor 1", switches[i].name, bad[j]);
            REFUSED(config, EINVAL, text);
        }
    }
    vm_close(&vm);
}

static void convert_units_are_powers_of_two_within_the_block(void)
{
    static const uint64_t bad[] = { 1, 2048, PAGE - 1, PAGE + 1, 3 * PAGE, 2 * MIB, 1ull << 63 };
    static const uint64_t good[] = { 0, PAGE, 64 * PAGE, MIB, GMEM_CONVERT_UNIT_OFF };
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct gmem_block_config config = block_config(MIB);

        config.convert_unit = bad[i];
        REFUSED(config, EINVAL, "ram7: a convert-unit of");
    }
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct gmem_block_config config = block_config(MIB);

        config.convert_unit = good[i];
        accepted(&vm, &config);
    }
    vm_close(&vm);
}

static void a_max_request_has_room_for_a_page(void)
{
    struct gmem_block_config config = block_config(4 * PAGE);
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    config.max_request = 1;
    REFUSED(config, EINVAL, "ram7: with a max-request of 0x1 bytes");
    config.max_request = PAGE;
    accepted(&vm, &config);
    config.max_request = UINT64_MAX;
    accepted(&vm, &config);
    vm_close(&vm);
}

static void the_other_kind_of_vms_backing_is_refused(void)
{
    struct gmem_block_config config = block_config(PAGE);
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    config.backing = GMEM_BACKING_SPLIT;
    REFUSED(config, EINVAL, "ram7: backing=split is for confidential VMs");
    config.backing = GMEM_BACKING_IN_PLACE;
    accepted(&vm, &config);
    config.confidential = 1;
    REFUSED(config, ENOTSUP, "ram7: the kernel lacks, for this VM: KVM_SET_MEMORY_ATTRIBUTES2");
    config.confidential = 0;
    config.backing = GMEM_BACKING_AUTO;
    config.initial = GMEM_PRIVATE;
    REFUSED(config, EINVAL, "ram7: memory can't start private in an ordinary VM");
    vm_close(&vm);
}

static void an_ordinary_vm_has_no_confidential_memory(void)
{
    struct gmem_block_config config = block_config(PAGE);
    struct gmem_probe probe;
    struct vm vm;

    if (!vm_open(&vm)) {
        return;
    }
    memset(&probe, 0, sizeof probe);
    probe.struct_size = sizeof probe;
    OK(gmem_vm_probe(vm.handle, &probe));
    CHECK(!probe.private_attribute && !probe.in_place_conversion);
    config.confidential = 1;
    REFUSED(config, ENOTSUP, "ram7: the kernel lacks, for this VM:");
    CHECK(strstr(gmem_last_error(), "PRIVATE bit of KVM_CAP_MEMORY_ATTRIBUTES") != NULL);
    config.initial = GMEM_PRIVATE;
    config.backing = GMEM_BACKING_SPLIT;
    REFUSED(config, ENOTSUP, "PRIVATE bit of KVM_CAP_MEMORY_ATTRIBUTES");
    vm_close(&vm);
}

static void names_are_decoration(void)
{
    struct gmem_block_config config = block_config(1);
    char long_name[5000];
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    config.name = NULL;
    REFUSED(config, EINVAL, "memory: a size of");
    config.name = "";
    REFUSED(config, EINVAL, ": a size of");
    config.name = "caf\xe9";
    REFUSED(config, EINVAL, "caf\xef\xbf\xbd: a size of");
    /* No text of a caller's breaks a log's lines. */
    config.name = "two\nlines\x1b[31m";
    REFUSED(config, EINVAL, "two");
    CHECK(strchr(gmem_last_error(), '\x1b') == NULL);
    memset(long_name, 'n', sizeof long_name);
    long_name[sizeof long_name - 1] = '\0';
    config.name = long_name;
    REFUSED(config, EINVAL, "nnnn: a size of");
    config.size = PAGE;
    accepted(&vm, &config);
    vm_close(&vm);
}

static void null_is_no_structure_and_no_place(void)
{
    struct gmem_block_config config = block_config(PAGE);
    struct gmem_block *block = NULL;
    uint32_t attribute;
    uint64_t end;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    FAILS(gmem_block_new(vm.handle, NULL, &block), EINVAL, "struct gmem_block_config is NULL");
    FAILS(gmem_block_new(vm.handle, &config, NULL), EINVAL, "new handle is NULL");
    FAILS(gmem_vm_probe(vm.handle, NULL), EINVAL, "struct gmem_probe is NULL");
    FAILS(gmem_vm_get_stats(vm.handle, NULL), EINVAL, "struct gmem_vm_stats is NULL");
    block = block_new(&vm, "ram7", PAGE);
    FAILS(gmem_block_get_stats(block, NULL), EINVAL, "struct gmem_block_stats is NULL");
    FAILS(gmem_block_get_memslot(block, 0, NULL), EINVAL, "struct gmem_memslot is NULL");
    FAILS(gmem_block_get_run(block, 0, NULL, &attribute), EINVAL, "NULL");
    FAILS(gmem_block_get_run(block, 0, &end, NULL), EINVAL, "NULL");
    FAILS(gmem_max_order(block, 0, NULL), EINVAL, "NULL");
    FAILS(gmem_listener_add(block, NULL, NULL, NULL), EINVAL, "struct gmem_listener_ops is NULL");
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void structures_of_no_version_are_refused(void)
{
    struct gmem_listener *listener = NULL;
    struct gmem_window *window = NULL;
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", PAGE);
    for (size_t missing = 1; missing <= sizeof(size_t) + 1; missing++) {
        struct gmem_block_config config = block_config(PAGE);
        struct gmem_window_config place = window_config(0, 0, PAGE);
        struct gmem_memslot slot = memslot();
        struct gmem_listener_ops ops;
        struct gmem_block_stats block_stats;
        struct gmem_vm_stats vm_stats;
        struct gmem_probe probe;

        memset(&ops, 0, sizeof ops);
        memset(&block_stats, 0xee, sizeof block_stats);
        memset(&vm_stats, 0, sizeof vm_stats);
        memset(&probe, 0, sizeof probe);
        /* Sizes from none at all to one byte less than the first version's. */
#define SHORTER(structure) \
    SHORTER_THAN(structure, sizeof(structure))
#define SHORTER_THAN(structure, first) \
    ((structure).struct_size = missing > sizeof(size_t) ? 0 : (first) - missing)
        SHORTER_THAN(config, offsetof(struct gmem_block_config, policy_mode));
        SHORTER(place);
        SHORTER(slot);
        SHORTER(ops);
        SHORTER_THAN(block_stats, offsetof(struct gmem_block_stats, cut_calls));
        SHORTER(vm_stats);
        SHORTER_THAN(probe, offsetof(struct gmem_probe, huge_page_sizes));
        REFUSED(config, EINVAL, "struct_size of struct gmem_block_config is");
        FAILS(gmem_window_new(block, &place, &window), EINVAL, "struct gmem_window_config");
        FAILS(gmem_block_get_memslot(block, 0, &slot), EINVAL, "struct gmem_memslot");
        FAILS(gmem_listener_add(block, &ops, NULL, &listener), EINVAL, "gmem_listener_ops");
        FAILS(gmem_block_get_stats(block, &block_stats), EINVAL, "struct gmem_block_stats");
        FAILS(gmem_vm_get_stats(vm.handle, &vm_stats), EINVAL, "struct gmem_vm_stats");
        FAILS(gmem_vm_probe(vm.handle, &probe), EINVAL, "struct gmem_probe");
        EQUAL(block_stats.size, 0xeeeeeeeeeeeeeeee);
    }
    CHECK(window == NULL && listener == NULL);
    OK(gmem_block_free(block));
    vm_close(&vm);
}

/* Most likely nobody set it: what it says must not be believed. */
static void absurd_structure_sizes_are_refused(void)
{
    static const size_t sizes[] = { 4097, 1u << 30, SIZE_MAX / 2, SIZE_MAX };
    struct vm vm;

    if (!vm_open(&vm)) {
        return;
    }
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct gmem_block_config config = block_config(PAGE);
        struct gmem_probe probe;

        config.struct_size = sizes[i];
        REFUSED(config, EINVAL, "struct_size of struct gmem_block_config is");
        memset(&probe, 0, sizeof probe);
        probe.struct_size = sizes[i];
        FAILS(gmem_vm_probe(vm.handle, &probe), EINVAL, "struct_size of struct gmem_probe is");
    }
    vm_close(&vm);
}

/* A caller that was built with the first header. */
static void earlier_structures_are_understood(void)
{
    struct gmem_block_config config = block_config(PAGE);
    struct gmem_block_stats stats;
    struct gmem_block *block = NULL;
    struct gmem_probe probe;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    /* What it doesn't have isn't read... */
    config.struct_size = offsetof(struct gmem_block_config, policy_mode);
    memset((char *)&config + config.struct_size, 0xee, sizeof config - config.struct_size);
    OK(gmem_block_new(vm.handle, &config, &block));
    /* ...nor written. */
    memset(&stats, 0xee, sizeof stats);
    stats.struct_size = offsetof(struct gmem_block_stats, cut_calls);
    OK(gmem_block_get_stats(block, &stats));
    EQUAL(stats.size, PAGE);
    EQUAL(stats.cut_calls, 0xeeeeeeeeeeeeeeee);
    memset(&probe, 0xee, sizeof probe);
    probe.struct_size = offsetof(struct gmem_probe, huge_page_sizes);
    OK(gmem_vm_probe(vm.handle, &probe));
    CHECK(probe.guest_memfd_mmap);
    EQUAL(probe.huge_page_sizes, 0xeeeeeeeeeeeeeeee);
    OK(gmem_block_free(block));
    vm_close(&vm);
}

/* A caller that was built with a later header. */
static void later_structures_are_understood(void)
{
    struct {
        struct gmem_block_config known;
        uint64_t later[4];
    } config;
    struct {
        struct gmem_block_stats known;
        unsigned char later[64];
    } stats;
    struct gmem_block *block = NULL;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    memset(&config, 0, sizeof config);
    config.known = block_config(PAGE);
    config.known.struct_size = sizeof config;
    OK(gmem_block_new(vm.handle, &config.known, &block));
    memset(&stats, 0xee, sizeof stats);
    stats.known.struct_size = sizeof stats;
    OK(gmem_block_get_stats(block, &stats.known));
    EQUAL(stats.known.struct_size, sizeof stats);
    EQUAL(stats.known.size, PAGE);
    for (size_t i = 0; i < sizeof stats.later; i++) {
        EQUAL(stats.later[i], 0xee);
    }
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void later_properties_are_refused_not_ignored(void)
{
    struct {
        struct gmem_block_config known;
        uint64_t later[2];
    } config;
    struct gmem_block *block = NULL;
    struct vm vm;

    if (!vm_open(&vm)) {
        return;
    }
    memset(&config, 0, sizeof config);
    config.known = block_config(PAGE);
    config.known.struct_size = sizeof config;
    config.later[1] = 1;
    FAILS(gmem_block_new(vm.handle, &config.known, &block), EINVAL, "struct gmem_block_config");
    CHECK(block == NULL);
    vm_close(&vm);
}

/* Memory of exactly the structure's size: the sanitizer sees a byte too much. */
static void no_byte_beyond_a_structure_is_touched(void)
{
    struct gmem_block_config *config;
    struct gmem_block_stats *stats;
    struct gmem_block *block = NULL;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    config = (struct gmem_block_config *)malloc(sizeof *config);
    stats = (struct gmem_block_stats *)malloc(sizeof *stats);
    *config = block_config(PAGE);
    OK(gmem_block_new(vm.handle, config, &block));
    free(config);
    stats->struct_size = sizeof *stats;
    OK(gmem_block_get_stats(block, stats));
    EQUAL(stats->struct_size, sizeof *stats);
    free(stats);
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void without_files_nothing_is_half_created(void)
{
    struct gmem_block_config config = block_config(PAGE);
    struct gmem_vm *second = NULL;
    struct rlimit limit;
    struct rlimit few;
    int other = open("/dev/null", O_RDONLY);
    int taken[64];
    int count = 0;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    few = limit;
    few.rlim_cur = 64;
    CHECK(setrlimit(RLIMIT_NOFILE, &few) == 0);
    while (count < 64 && (taken[count] = dup(vm.fd)) >= 0) {
        count++;
    }
    CHECK(errno == EMFILE);
    REFUSED(config, EMFILE, "ram7: creating a guest_memfd of 0x1000 bytes");
    CHECK(strstr(gmem_last_error(), "KVM_CREATE_GUEST_MEMFD") != NULL);
    FAILS(gmem_vm_new(vm.fd, &second), EMFILE, "keeping the VM's file open");
    CHECK(second == NULL);
    /* With one left it is asked what it is: a file that is no VM needs no more. */
    close(taken[--count]);
    FAILS(gmem_vm_new(other, &second), ENOTTY, "VM");
    close(other);
    while (count > 0) {
        close(taken[--count]);
    }
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    accepted(&vm, &config);
    vm_close(&vm);
}

static void a_hundred_blocks_leave_no_trace(void)
{
    uint64_t address_space;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    OK(gmem_block_free(block_new(&vm, "ram7", 64 * MIB)));
    address_space = status_kib("VmSize");
    for (int i = 0; i < 100; i++) {
        struct gmem_block_config config = block_config(1ull << 50);

        OK(gmem_block_free(block_new(&vm, "ram7", 64 * MIB)));
        REFUSED(config, ENOMEM, "ram7: mapping");
    }
    /* One that leaks its mapping, or the reservation around it, costs 64 MiB or more. */
    CHECK(status_kib("VmSize") < address_space + 64 * 1024);
    vm_close(&vm);
}

const struct test_case config_cases[] = {
    CASE(sizes_that_make_no_sense_are_refused),
    CASE(a_structure_of_zeros_is_an_ordinary_block),
    CASE(sizes_without_room_leave_nothing),
    CASE(what_this_version_lacks_is_refused_by_name),
    CASE(huge_pages_that_can_not_be_are_refused_by_name),
    CASE(policies_that_can_not_be_are_refused_by_name),
    CASE(unknown_values_are_refused_by_name),
    CASE(switches_that_are_neither_0_nor_1_are_refused_by_name),
    CASE(convert_units_are_powers_of_two_within_the_block),
    CASE(a_max_request_has_room_for_a_page),
    CASE(the_other_kind_of_vms_backing_is_refused),
    CASE(an_ordinary_vm_has_no_confidential_memory),
    CASE(names_are_decoration),
    CASE(null_is_no_structure_and_no_place),
    CASE(structures_of_no_version_are_refused),
    CASE(absurd_structure_sizes_are_refused),
    CASE(earlier_structures_are_understood),
    CASE(later_structures_are_understood),
    CASE(later_properties_are_refused_not_ignored),
    CASE(no_byte_beyond_a_structure_is_touched),
    CASE(without_files_nothing_is_half_created),
    CASE(a_hundred_blocks_leave_no_trace),
    END_OF_CASES,
};
