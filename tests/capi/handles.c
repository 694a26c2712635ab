/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Handles: none, foreign, forged, stale; what is in use stays; which files are VMs. */
#include "harness.h"

#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

/* Every function that takes a VM, given one that is none. */
static void no_vm_by(struct gmem_vm *none, const char *part)
{
    struct gmem_block_config config = block_config(PAGE);
    struct gmem_block *block = NULL;
    struct gmem_vm_stats stats;
    struct gmem_probe probe;

    memset(&probe, 0, sizeof probe);
    probe.struct_size = sizeof probe;
    memset(&stats, 0, sizeof stats);
    stats.struct_size = sizeof stats;
    FAILS(gmem_vm_probe(none, &probe), EINVAL, part);
    CHECK(!probe.user_memory2 && !probe.guest_memfd);
    FAILS(gmem_vm_get_stats(none, &stats), EINVAL, part);
    FAILS(gmem_block_new(none, &config, &block), EINVAL, part);
    CHECK(block == NULL);
    FAILS(gmem_convert(none, 0, PAGE, GMEM_SHARED), EINVAL, part);
    FAILS(gmem_vm_detach(none), EINVAL, part);
    FAILS(gmem_vm_poison(none, 0, PAGE), EINVAL, part);
    FAILS(gmem_vm_attach(none, 0), EINVAL, part);
    if (none != NULL) {
        FAILS(gmem_vm_free(none), EINVAL, part);
    }
}

/* Every function that takes a block, given one that is none. */
static void no_block_by(struct gmem_block *none, const char *part)
{
    struct gmem_window_config config = window_config(0, 0, PAGE);
    struct gmem_memslot slot = memslot();
    struct gmem_window *window = NULL;
    struct gmem_listener *listener = NULL;
    struct gmem_listener_ops ops;
    struct gmem_block_stats stats;
    uint64_t end = 7;
    uint32_t attribute = 7;

    memset(&ops, 0, sizeof ops);
    ops.struct_size = sizeof ops;
    memset(&stats, 0, sizeof stats);
    stats.struct_size = sizeof stats;
    CHECK(gmem_block_host(none) == NULL);
    CHECK(strstr(gmem_last_error(), part) != NULL);
    FAILS(gmem_block_shared_fd(none), EINVAL, part);
    FAILS(gmem_block_private_fd(none), EINVAL, part);
    FAILS(gmem_block_get_memslot(none, 0, &slot), EINVAL, part);
    FAILS(gmem_block_preallocate(none, 1), EINVAL, part);
    FAILS(gmem_block_reset(none), EINVAL, part);
    FAILS(gmem_block_place(none, 0, &config, 1), EINVAL, part);
    FAILS(gmem_block_discard(none, 0, PAGE), EINVAL, part);
    FAILS(gmem_block_poison(none, 0, PAGE), EINVAL, part);
    FAILS(gmem_block_get_stats(none, &stats), EINVAL, part);
    FAILS(gmem_block_get_run(none, 0, &end, &attribute), EINVAL, part);
    FAILS(gmem_max_order(none, 0, &attribute), EINVAL, part);
    FAILS(gmem_block_check_access(none, 0, 1), EINVAL, part);
    FAILS(gmem_bind(none, 0, PAGE, 0), EINVAL, part);
    FAILS(gmem_unbind(none, 0, PAGE, 0), EINVAL, part);
    FAILS(gmem_window_new(none, &config, &window), EINVAL, part);
    FAILS(gmem_listener_add(none, &ops, NULL, &listener), EINVAL, part);
    CHECK(window == NULL && listener == NULL && end == 7 && attribute == 7);
    if (none != NULL) {
        FAILS(gmem_block_free(none), EINVAL, part);
    }
}

static void null_is_no_handle(void)
{
    no_vm_by(NULL, "VM is NULL");
    no_block_by(NULL, "block is NULL");
}

static void null_ends_without_complaint(void)
{
    OK(gmem_vm_free(NULL));
    OK(gmem_block_free(NULL));
    OK(gmem_window_free(NULL));
    OK(gmem_listener_remove(NULL));
}

static void forged_handles_are_refused(void)
{
    static const uintptr_t forged[] = { 1, 8, 15, 4096, 0x7fffffffffff, UINTPTR_MAX };
    int here = 0;

    for (size_t i = 0; i < sizeof forged / sizeof *forged; i++) {
        no_vm_by((struct gmem_vm *)forged[i], "VM's handle");
        no_block_by((struct gmem_block *)forged[i], "block's handle");
        FAILS(gmem_window_free((struct gmem_window *)forged[i]), EINVAL, "window's handle");
        FAILS(gmem_listener_remove((struct gmem_listener *)forged[i]), EINVAL, "listener's handle");
    }
    no_vm_by((struct gmem_vm *)(void *)&here, "VM's handle");
    no_block_by((struct gmem_block *)(void *)&here, "block's handle");
}

static void stale_handles_are_refused(void)
{
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", PAGE);
    OK(gmem_block_free(block));
    no_block_by(block, "has ended");
    vm_close(&vm);
    no_vm_by(vm.handle, "has ended");
}

static void handles_of_another_kind_are_refused(void)
{
    struct gmem_listener *listener = NULL;
    struct gmem_listener_ops ops;
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    memset(&ops, 0, sizeof ops);
    ops.struct_size = sizeof ops;
    block = block_new(&vm, "ram7", PAGE);
    OK(gmem_listener_add(block, &ops, NULL, &listener));
    no_vm_by((struct gmem_vm *)block, "VM's handle");
    no_vm_by((struct gmem_vm *)listener, "VM's handle");
    no_block_by((struct gmem_block *)vm.handle, "block's handle");
    no_block_by((struct gmem_block *)listener, "block's handle");
    FAILS(gmem_window_free((struct gmem_window *)block), EINVAL, "window's handle");
    FAILS(gmem_listener_remove((struct gmem_listener *)vm.handle), EINVAL, "listener's handle");
    OK(gmem_listener_remove(listener));
    FAILS(gmem_listener_remove(listener), EINVAL, "has ended");
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void handles_are_never_given_out_again(void)
{
    struct gmem_block *block;
    struct gmem_block *next;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", PAGE);
    OK(gmem_block_free(block));
    next = block_new(&vm, "ram7", PAGE);
    CHECK(block != next);
    FAILS(gmem_block_free(block), EINVAL, "has ended");
    EQUAL(block_stats(next).size, PAGE);
    OK(gmem_block_free(next));
    vm_close(&vm);
}

static void what_is_in_use_stays(void)
{
    struct gmem_listener *listener = NULL;
    struct gmem_listener_ops ops;
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    memset(&ops, 0, sizeof ops);
    ops.struct_size = sizeof ops;
    block = block_new(&vm, "ram7", 4 * PAGE);
    FAILS(gmem_vm_free(vm.handle), EBUSY, "blocks");
    OK(gmem_bind(block, 0, PAGE, 0));
    FAILS(gmem_block_free(block), EBUSY, "ram7: it is still bound");
    OK(gmem_listener_add(block, &ops, NULL, &listener));
    OK(gmem_unbind(block, 0, PAGE, 0));
    FAILS(gmem_block_free(block), EBUSY, "ram7: it is still listened to");
    FAILS(gmem_vm_free(vm.handle), EBUSY, "blocks");
    /* Refused, it works as before. */
    memset(gmem_block_host(block), 0x5a, 4 * PAGE);
    OK(gmem_listener_remove(listener));
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void a_dead_file_is_no_vm(void)
{
    struct gmem_vm *vm = NULL;
    int dead = dup(0);

    close(dead);
    FAILS(gmem_vm_new(dead, &vm), EBADF, "VM");
    FAILS(gmem_vm_new(-1, &vm), EBADF, "VM");
    FAILS(gmem_vm_new(INT32_MAX, &vm), EBADF, "VM");
    FAILS(gmem_vm_new(INT32_MIN, &vm), EBADF, "VM");
    CHECK(vm == NULL);
    FAILS(gmem_vm_new(0, NULL), EINVAL, "NULL");
}

static void other_files_are_no_vms(void)
{
    static const char *const paths[] = { "/dev/null", "/dev/zero", "/proc/self/maps", "/" };
    struct gmem_vm *vm = NULL;
    int files[2];

    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        int fd = open(paths[i], O_RDONLY | O_CLOEXEC);

        FAILS(gmem_vm_new(fd, &vm), ENOTTY, "KVM VM");
        close(fd);
    }
    if (CHECK(pipe(files) == 0)) {
        FAILS(gmem_vm_new(files[0], &vm), ENOTTY, "KVM VM");
        close(files[0]);
        close(files[1]);
    }
    files[0] = eventfd(0, EFD_CLOEXEC);
    FAILS(gmem_vm_new(files[0], &vm), ENOTTY, "KVM VM");
    close(files[0]);
    CHECK(vm == NULL);
}

static void kvms_other_files_are_no_vms(void)
{
    struct gmem_vm *handle = NULL;
    struct gmem_block *block;
    struct vm vm;
    int fd;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    FAILS(gmem_vm_new(fd, &handle), ENOTTY, "KVM VM");
    close(fd);
    fd = ioctl(vm.fd, KVM_CREATE_VCPU, 0);
    FAILS(gmem_vm_new(fd, &handle), ENOTTY, "KVM VM");
    close(fd);
    block = block_new(&vm, "ram7", PAGE);
    FAILS(gmem_vm_new(gmem_block_private_fd(block), &handle), ENOTTY, "KVM VM");
    CHECK(handle == NULL);
    OK(gmem_block_free(block));
    vm_close(&vm);
}

static void the_callers_file_of_the_vm_may_go(void)
{
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    close(vm.fd);
    /* The number now names something else. */
    vm.fd = eventfd(0, EFD_CLOEXEC);
    block = block_new(&vm, "ram7", PAGE);
    OK(gmem_bind(block, 0, PAGE, 0));
    OK(gmem_convert(vm.handle, 0, PAGE, GMEM_SHARED));
    OK(gmem_unbind(block, 0, PAGE, 0));
    OK(gmem_block_free(block));
    vm_close(&vm);
}

/* What a VMM holds of a block is as good after a rebuild as before. */
static void a_vm_is_rebuilt_under_its_blocks(void)
{
    struct gmem_block_config config = block_config(4 * MIB);
    struct gmem_memslot slot = memslot();
    struct gmem_block *block;
    struct gmem_block *more = NULL;
    volatile uint64_t *host;
    uint32_t order = 7;
    struct vm vm;
    struct vm next;
    int fd;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", 4 * MIB);
    fd = gmem_block_private_fd(block);
    host = (volatile uint64_t *)gmem_block_host(block);
    *host = 42;
    OK(gmem_bind(block, 0, 4 * MIB, 0));
    FAILS(gmem_vm_attach(vm.handle, vm.fd), EBUSY, "detach that first");
    OK(gmem_vm_detach(vm.handle));
    OK(gmem_vm_detach(vm.handle));
    close(vm.fd);
    FAILS(gmem_bind(block, 0, 4 * MIB, 0), EBUSY, "until it is rebuilt");
    FAILS(gmem_convert(vm.handle, 0, PAGE, GMEM_SHARED), EBUSY, "until it is rebuilt");
    FAILS(gmem_block_preallocate(block, 1), EBUSY, "until it is rebuilt");
    FAILS(gmem_block_check_access(block, 0, 1), EBUSY, "until it is rebuilt");
    FAILS(gmem_block_get_memslot(block, 0, &slot), EBUSY, "until it is rebuilt");
    FAILS(gmem_block_new(vm.handle, &config, &more), EBUSY, "until it is rebuilt");
    FAILS(gmem_vm_free(vm.handle), EBUSY, "still has blocks");
    OK(gmem_max_order(block, 0, &order));
    EQUAL(order, 10);
    EQUAL(block_stats(block).bindings, 0);
    FAILS(gmem_vm_attach(vm.handle, -1), EBADF, "new VM");
    FAILS(gmem_vm_attach(vm.handle, STDIN_FILENO), ENOTTY, "not that of a KVM VM");
    if (!vm_open_in_place(&next)) {
        return;
    }
    OK(gmem_vm_attach(vm.handle, next.fd));
    vm_close(&next);
    EQUAL(gmem_block_private_fd(block), fd);
    CHECK(gmem_block_host(block) == (void *)host);
    EQUAL(*host, 0);
    OK(gmem_block_get_memslot(block, 0, &slot));
    EQUAL(slot.guest_memfd, fd);
    OK(gmem_bind(block, 0, 4 * MIB, 0));
    OK(gmem_unbind(block, 0, 4 * MIB, 0));
    OK(gmem_vm_detach(vm.handle));
    OK(gmem_block_free(block));
    OK(gmem_vm_free(vm.handle));
}

static bool forking;

static void *keep_busy(void *opaque)
{
    struct gmem_vm *vm = (struct gmem_vm *)opaque;

    while (__atomic_load_n(&forking, __ATOMIC_RELAXED)) {
        struct gmem_block *block = NULL;
        struct gmem_block_config config = block_config(PAGE);

        OK(gmem_block_new(vm, &config, &block));
        FAILS(gmem_convert(vm, 1, PAGE, GMEM_SHARED), EINVAL, "are not whole pages");
        OK(gmem_block_free(block));
    }
    return NULL;
}

/* Whatever other threads have locked when it is forked. */
static void a_child_that_executes_a_program_waits_for_nobody(void)
{
    pthread_t threads[3];
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    __atomic_store_n(&forking, true, __ATOMIC_RELAXED);
    for (size_t i = 0; i < 3; i++) {
        CHECK(pthread_create(&threads[i], NULL, keep_busy, vm.handle) == 0);
    }
    for (int i = 0; i < 50; i++) {
        int status = -1;
        pid_t child = fork();

        if (child == 0) {
            /* Should it hang after all, this ends it. */
            alarm(60);
            if (i % 2 == 0) {
                execl("/bin/true", "true", (char *)NULL);
            }
            _exit(0);
        }
        CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    }
    __atomic_store_n(&forking, false, __ATOMIC_RELAXED);
    for (size_t i = 0; i < 3; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    vm_close(&vm);
}

static void one_file_makes_any_number_of_vms(void)
{
    struct gmem_vm *second = NULL;
    struct gmem_block *block;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    OK(gmem_vm_new(vm.fd, &second));
    CHECK(second != NULL && second != vm.handle);
    block = block_new(&vm, "ram7", PAGE);
    OK(gmem_vm_free(second));
    FAILS(gmem_vm_free(second), EINVAL, "has ended");
    OK(gmem_block_free(block));
    vm_close(&vm);
}

#define THREADS 8
#define ROUNDS 200

struct racer {
    struct vm *vm;
    struct gmem_block *shared;
    uint64_t number;
    unsigned frees;
};

/* Blocks of its own come and go; one that all share is bound where others are not. */
static void *race(void *argument)
{
    struct racer *racer = (struct racer *)argument;
    uint64_t offset = racer->number * PAGE;

    for (unsigned round = 0; round < ROUNDS; round++) {
        struct gmem_block *own = block_new(racer->vm, "own", PAGE);
        uint64_t gpa = (1 + racer->number) * MIB;

        OK(gmem_bind(racer->shared, offset, PAGE, offset));
        OK(gmem_bind(own, 0, PAGE, gpa));
        OK(gmem_convert(racer->vm->handle, gpa, PAGE, GMEM_SHARED));
        FAILS(gmem_convert(racer->vm->handle, gpa, PAGE, GMEM_PRIVATE), EINVAL, "own");
        OK(gmem_unbind(own, 0, PAGE, gpa));
        OK(gmem_unbind(racer->shared, offset, PAGE, offset));
        OK(gmem_block_free(own));
    }
    return NULL;
}

static void *free_once(void *argument)
{
    struct racer *racer = (struct racer *)argument;

    racer->frees = gmem_block_free(racer->shared) == 0;
    return NULL;
}

static void any_thread_may_call_anything(void)
{
    struct racer racers[THREADS];
    pthread_t threads[THREADS];
    struct gmem_block *block;
    unsigned frees = 0;
    struct vm vm;

    if (!vm_open_in_place(&vm)) {
        return;
    }
    block = block_new(&vm, "ram7", THREADS * PAGE);
    for (unsigned i = 0; i < THREADS; i++) {
        racers[i].vm = &vm;
        racers[i].shared = block;
        racers[i].number = i;
        racers[i].frees = 0;
        CHECK(pthread_create(&threads[i], NULL, race, &racers[i]) == 0);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    EQUAL(block_stats(block).bindings, 0);
    EQUAL(vm_stats(vm.handle).requests, 2 * THREADS * ROUNDS);
    for (unsigned i = 0; i < THREADS; i++) {
        CHECK(pthread_create(&threads[i], NULL, free_once, &racers[i]) == 0);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        frees += racers[i].frees;
    }
    EQUAL(frees, 1);
    vm_close(&vm);
}

const struct test_case handle_cases[] = {
    CASE(null_is_no_handle),
    CASE(null_ends_without_complaint),
    CASE(forged_handles_are_refused),
    CASE(stale_handles_are_refused),
    CASE(handles_of_another_kind_are_refused),
    CASE(handles_are_never_given_out_again),
    CASE(what_is_in_use_stays),
    CASE(a_dead_file_is_no_vm),
    CASE(other_files_are_no_vms),
    CASE(kvms_other_files_are_no_vms),
    CASE(the_callers_file_of_the_vm_may_go),
    CASE(a_vm_is_rebuilt_under_its_blocks),
    CASE(a_child_that_executes_a_program_waits_for_nobody),
    CASE(one_file_makes_any_number_of_vms),
    CASE(any_thread_may_call_anything),
    END_OF_CASES,
};
