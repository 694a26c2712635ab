/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* DMA windows and listeners, as far as they need no device. */
#include "harness.h"

#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define BLOCK (16 * PAGE)

static void no_window(struct gmem_block *block, const struct gmem_window_config *config, int error,
                      const char *part, int line)
{
    struct gmem_window *window = NULL;

    check_error(gmem_window_new(block, config, &window), error, part, "gmem_window_new", __FILE__,
                line);
    check(window == NULL, "no handle of a refused window", __FILE__, line);
    check_equal(block_stats(block).windows, 0, "windows", __FILE__, line);
}

#define NO_WINDOW(config, error, part) no_window(block, &(config), (error), (part), __LINE__)

static void windows_that_make_no_sense_are_refused(void)
{
    static const uint64_t ranges[][2] = {
        { 0, 0 },     { 1, PAGE },       { 0, 1 },
        { 0, PAGE + 1 }, { BLOCK, PAGE }, { 0, BLOCK + PAGE },
        { PAGE, BLOCK }, { 0, UINT64_MAX }, { PAGE, 0 - PAGE },
        { UINT64_MAX, PAGE }, { 1ull << 63, 1ull << 63 },
    };
    static const uint64_t iovas[] = { 1, PAGE - 1, UINT64_MAX, 0 - PAGE };
    struct gmem_window *window = NULL;
    struct gmem_window_config config;
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        config = window_config(0, ranges[i][0], ranges[i][1]);
        NO_WINDOW(config, EINVAL, "a DMA window of");
    }
    for (size_t i = 0; i < sizeof iovas / sizeof *iovas; i++) {
        config = window_config(0, 0, PAGE);
        config.iova = iovas[i];
        NO_WINDOW(config, EINVAL, "can't be at iova");
    }
    config = window_config(0, 0, PAGE);
    config.readonly = 2;
    NO_WINDOW(config, EINVAL, "readonly is 2, neither 0 nor 1");
    config = window_config(0, 0, PAGE);
    FAILS(gmem_window_new(block, NULL, &window), EINVAL, "struct gmem_window_config is NULL");
    FAILS(gmem_window_new(block, &config, NULL), EINVAL, "new handle is NULL");
    CHECK(window == NULL);
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void a_dead_file_is_no_iommufd(void)
{
    struct gmem_window_config config;
    struct gmem_block *block;
    struct vm vm;
    int dead = dup(0);

    close(dead);
    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", BLOCK);
    config = window_config(-1, 0, PAGE);
    NO_WINDOW(config, EBADF, "iommufd");
    config = window_config(INT32_MAX, 0, PAGE);
    NO_WINDOW(config, EBADF, "iommufd");
    dead = dup(0);
    close(dead);
    config = window_config(dead, 0, PAGE);
    NO_WINDOW(config, EBADF, "iommufd");
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void other_files_are_no_iommufds(void)
{
    struct gmem_window_config config;
    struct gmem_block *block;
    struct vm vm;
    int event;
    int null;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    event = eventfd(0, EFD_CLOEXEC);
    null = open("/dev/null", O_RDWR | O_CLOEXEC);
    block = block_new(&vm, "ram7", BLOCK);
    config = window_config(event, 0, BLOCK);
    NO_WINDOW(config, ENOTTY, "IOMMU_OPTION");
    config = window_config(null, PAGE, PAGE);
    config.readonly = 1;
    NO_WINDOW(config, ENOTTY, "IOMMU_OPTION");
    config = window_config(gmem_block_shared_fd(block), 0, BLOCK);
    NO_WINDOW(config, ENOTTY, "IOMMU_OPTION");
    CHECK(strstr(gmem_last_error(), "ram7: ") != NULL);
    CHECK(strstr(gmem_last_error(), "the file is no /dev/iommu") != NULL);
    FAILS(gmem_ioas_prepare(null, 1), ENOTTY, "the file is no /dev/iommu");
    EQUAL(block_stats(block).bytes_dma_mapped, 0);
    EQUAL(block_stats(block).dma_areas, 0);
    EQUAL(block_stats(block).strategy, GMEM_STRATEGY_NONE);
    close(event);
    close(null);
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static int never(void *opaque, uint64_t offset, uint64_t size, uint32_t attribute,
                 uint64_t sequence)
{
    (void)opaque;
    (void)offset;
    (void)size;
    (void)attribute;
    (void)sequence;
    CHECK(!"nothing changes, so nobody is told");
    return -EIO;
}

static void listeners_hear_of_changes_only(void)
{
    struct gmem_listener *listeners[3] = { NULL, NULL, NULL };
    struct gmem_listener_ops ops;
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    memset(&ops, 0, sizeof ops);
    ops.struct_size = sizeof ops;
    ops.begin = never;
    block = block_new(&vm, "ram7", BLOCK);
    for (int i = 0; i < 3; i++) {
        OK(gmem_listener_add(block, &ops, NULL, &listeners[i]));
    }
    FAILS(gmem_listener_add(block, &ops, NULL, NULL), EINVAL, "new handle is NULL");
    OK(gmem_bind(block, 0, BLOCK, 0));
    OK(gmem_convert(vm.handle, 0, BLOCK, GMEM_SHARED));
    FAILS(gmem_convert(vm.handle, 0, BLOCK, GMEM_PRIVATE), EINVAL, "ram7: ");
    OK(gmem_block_reset(block));
    OK(gmem_unbind(block, 0, BLOCK, 0));
    for (int i = 0; i < 3; i++) {
        FAILS(gmem_block_free(block), EBUSY, "listened to");
        OK(gmem_listener_remove(listeners[i]));
        FAILS(gmem_listener_remove(listeners[i]), EINVAL, "has ended");
    }
    OK(gmem_block_free(block));
    vm_close(&vm);
}

const struct test_case window_cases[] = {
    CASE(windows_that_make_no_sense_are_refused),
    CASE(a_dead_file_is_no_iommufd),
    CASE(other_files_are_no_iommufds),
    CASE(listeners_hear_of_changes_only),
    END_OF_CASES,
};
