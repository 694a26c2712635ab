/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "harness.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static unsigned failed_checks;
static const char *skip_reason;

bool check(bool holds, const char *what, const char *file, int line)
{
    if (!holds) {
        __atomic_fetch_add(&failed_checks, 1, __ATOMIC_RELAXED);
        printf("%s:%d: not so: %s\n", file, line, what);
    }
    return holds;
}

bool check_equal(uint64_t left, uint64_t right, const char *what, const char *file, int line)
{
    if (!check(left == right, what, file, line)) {
        printf("    left %#llx, right %#llx\n", (unsigned long long)left,
               (unsigned long long)right);
    }
    return left == right;
}

bool check_ok(int result, const char *what, const char *file, int line)
{
    if (!check(result == 0, what, file, line)) {
        printf("    returned %d: %s\n", result, gmem_last_error());
    }
    return result == 0;
}

bool check_error(int result, int error, const char *part, const char *what, const char *file,
                 int line)
{
    const char *text = gmem_last_error();
    bool sentence = strlen(text) >= 10 && strchr(text, '\n') == NULL;

    if (!check(result == -error && sentence && strstr(text, part) != NULL, what, file, line)) {
        printf("    returned %d, wanted %d and a sentence with \"%s\"\n", result, -error, part);
        printf("    %s\n", result == 0 ? "" : text);
        return false;
    }
    return true;
}

void skip(const char *reason)
{
    skip_reason = reason;
}

unsigned open_files(void)
{
    DIR *dir = opendir("/proc/self/fd");
    unsigned count = 0;

    while (dir != NULL && readdir(dir) != NULL) {
        count++;
    }
    closedir(dir);
    return count;
}

unsigned shared_mappings(void)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[8192];
    unsigned count = 0;

    while (maps != NULL && fgets(line, sizeof line, maps) != NULL) {
        char permissions[8] = "";

        if (sscanf(line, "%*s %7s", permissions) == 1 && permissions[3] == 's') {
            count++;
        }
    }
    fclose(maps);
    return count;
}

uint64_t status_kib(const char *name)
{
    FILE *status = fopen("/proc/self/status", "re");
    char line[256];
    uint64_t kib = 0;

    while (status != NULL && fgets(line, sizeof line, status) != NULL) {
        if (strncmp(line, name, strlen(name)) == 0 && line[strlen(name)] == ':') {
            kib = strtoull(line + strlen(name) + 1, NULL, 10);
        }
    }
    fclose(status);
    return kib;
}

bool vm_open(struct vm *vm)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);

    if (kvm < 0) {
        skip("/dev/kvm can't be opened");
        return false;
    }
    vm->handle = NULL;
    vm->fd = ioctl(kvm, KVM_CREATE_VM, 0);
    close(kvm);
    if (!CHECK(vm->fd >= 0) || !OK(gmem_vm_new(vm->fd, &vm->handle))) {
        return false;
    }
    return true;
}

bool vm_open_in_place(struct vm *vm)
{
    struct gmem_probe probe;

    if (!vm_open(vm)) {
        return false;
    }
    memset(&probe, 0, sizeof probe);
    probe.struct_size = sizeof probe;
    if (OK(gmem_vm_probe(vm->handle, &probe)) && probe.user_memory2 && probe.guest_memfd
        && probe.guest_memfd_mmap && probe.guest_memfd_init_shared) {
        return true;
    }
    skip("this kernel has no guest_memfd for ordinary VMs (Linux 6.18)");
    vm_close(vm);
    return false;
}

void vm_close(struct vm *vm)
{
    OK(gmem_vm_free(vm->handle));
    close(vm->fd);
}

struct gmem_block_config block_config(uint64_t size)
{
    struct gmem_block_config config;

    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.name = "ram7";
    config.size = size;
    return config;
}

struct gmem_window_config window_config(int iommufd, uint64_t offset, uint64_t length)
{
    struct gmem_window_config config;

    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.iommufd = iommufd;
    config.ioas_id = 1;
    config.offset = offset;
    config.length = length;
    return config;
}

struct gmem_memslot memslot(void)
{
    struct gmem_memslot slot;

    memset(&slot, 0, sizeof slot);
    slot.struct_size = sizeof slot;
    return slot;
}

struct gmem_block_stats block_stats(const struct gmem_block *block)
{
    struct gmem_block_stats stats;

    memset(&stats, 0, sizeof stats);
    stats.struct_size = sizeof stats;
    OK(gmem_block_get_stats(block, &stats));
    return stats;
}

struct gmem_vm_stats vm_stats(const struct gmem_vm *vm)
{
    struct gmem_vm_stats stats;

    memset(&stats, 0, sizeof stats);
    stats.struct_size = sizeof stats;
    OK(gmem_vm_get_stats(vm, &stats));
    return stats;
}

struct gmem_block *block_new(const struct vm *vm, const char *name, uint64_t size)
{
    struct gmem_block_config config = block_config(size);
    struct gmem_block *block = NULL;

    config.name = name;
    OK(gmem_block_new(vm->handle, &config, &block));
    return block;
}

/* Runs one case between two counts of what this process holds. False if it failed. */
static bool run(const struct test_case *test, const char *label)
{
    unsigned files = open_files();
    unsigned mappings = shared_mappings();

    failed_checks = 0;
    skip_reason = NULL;
    test->run();
    CHECK(open_files() == files);
    CHECK(shared_mappings() == mappings);
    if (failed_checks == 0 && skip_reason != NULL) {
        printf("SKIPPED %s/%s: %s\n", label, test->name, skip_reason);
        return true;
    }
    printf("test %s ... %s\n", test->name, failed_checks == 0 ? "ok" : "FAILED");
    return failed_checks == 0;
}

/* usage: capi LABEL [CASE] */
int main(int argc, char **argv)
{
    static const struct test_case *const all[] = {
        message_cases, handle_cases, config_cases, range_cases, window_cases,
    };
    unsigned failed = 0;
    unsigned ran = 0;

    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t group = 0; group < sizeof all / sizeof *all; group++) {
        for (const struct test_case *test = all[group]; test->name != NULL; test++) {
            if (argc < 3 || strcmp(argv[2], test->name) == 0) {
                ran++;
                failed += !run(test, argc < 2 ? "capi" : argv[1]);
            }
        }
    }
    printf("%u cases, %u failed\n", ran, failed);
    return failed == 0 && ran != 0 ? 0 : 1;
}
