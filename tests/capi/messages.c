/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What the library says: errors, log, version, results for guests. */
#include "harness.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static unsigned seen[GMEM_LOG_TRACE + 1];
static char the_opaque;

unsigned messages(uint32_t level)
{
    return __atomic_load_n(&seen[level], __ATOMIC_RELAXED);
}

static void receive(void *opaque, uint32_t level, const char *message)
{
    CHECK(opaque == &the_opaque);
    CHECK(strlen(message) > 0 && strchr(message, '\n') == NULL);
    /* Whatever a caller does, a panic is a bug of the library. */
    if (!CHECK(strstr(message, "panicked") == NULL && strstr(message, "a bug in gmem") == NULL)) {
        printf("    %s\n", message);
    }
    if (CHECK(level >= GMEM_LOG_ERROR && level <= GMEM_LOG_INFO)) {
        __atomic_fetch_add(&seen[level], 1, __ATOMIC_RELAXED);
    }
}

static void *first_words(void *unused)
{
    EQUAL(strlen(gmem_last_error()), 0);
    return unused;
}

/* Must be the first case: a thread that hasn't failed yet has nothing to say. */
static void nothing_failed_so_far(void)
{
    pthread_t thread;

    first_words(NULL);
    if (CHECK(pthread_create(&thread, NULL, first_words, NULL) == 0)) {
        pthread_join(thread, NULL);
    }
}

static void the_log_has_one_receiver(void)
{
    FAILS(gmem_set_log(NULL, NULL, GMEM_LOG_INFO), EINVAL, "log function is NULL");
    FAILS(gmem_set_log(receive, &the_opaque, 0), EINVAL, "0 is no log level");
    FAILS(gmem_set_log(receive, &the_opaque, GMEM_LOG_TRACE + 1), EINVAL, "6 is no log level");
    FAILS(gmem_set_log(receive, &the_opaque, UINT32_MAX), EINVAL, "no log level");
    OK(gmem_set_log(receive, &the_opaque, GMEM_LOG_INFO));
    FAILS(gmem_set_log(receive, &the_opaque, GMEM_LOG_INFO), EBUSY, "receiver already");
    FAILS(gmem_set_log(receive, NULL, GMEM_LOG_TRACE), EBUSY, "receiver already");
}

static void a_new_block_says_what_was_chosen(void)
{
    unsigned before = messages(GMEM_LOG_INFO);
    struct vm vm;

    if (vm_open_in_place(&vm)) {
        OK(gmem_block_free(block_new(&vm, "ram7", PAGE)));
        CHECK(messages(GMEM_LOG_INFO) > before);
        vm_close(&vm);
    }
}

static void *fail_elsewhere(void *unused)
{
    FAILS(gmem_vm_new(-1, NULL), EINVAL, "NULL");
    return unused;
}

static void errors_belong_to_their_thread_and_stay(void)
{
    struct gmem_vm *vm = NULL;
    char text[512];
    pthread_t thread;

    FAILS(gmem_vm_new(-1, &vm), EBADF, "VM");
    CHECK(vm == NULL);
    snprintf(text, sizeof text, "%s", gmem_last_error());
    if (CHECK(pthread_create(&thread, NULL, fail_elsewhere, NULL) == 0)) {
        pthread_join(thread, NULL);
    }
    OK(gmem_vm_free(NULL));
    CHECK(strcmp(text, gmem_last_error()) == 0);
}

/* A call that returns 0 may have something to say all the same. */
static void a_verdict_has_a_sentence_of_its_own(void)
{
    uint32_t verdict = GMEM_FAULT_SERVED;
    struct vm vm;

    if (!vm_open(&vm)) {
        return;
    }
    FAILS(gmem_vm_new(-1, NULL), EINVAL, "NULL");
    OK(gmem_memory_fault(vm.handle, MIB, PAGE, GMEM_SHARED, 1, UINT64_MAX, &verdict));
    EQUAL(verdict, GMEM_FAULT_NEVER);
    CHECK(strstr(gmem_last_error(), "is not guest memory") != NULL);
    FAILS(gmem_memory_fault(vm.handle, MIB, PAGE, GMEM_SHARED, 1, 0, NULL), EINVAL, "verdict is NULL");
    vm_close(&vm);
}

static void a_sequence_is_a_vms(void)
{
    const uint64_t *sequence;
    struct vm vm;

    OK(gmem_vm_free(NULL));
    CHECK(gmem_vm_sequence(NULL) == NULL);
    CHECK(strstr(gmem_last_error(), "VM is NULL") != NULL);
    if (!vm_open(&vm)) {
        return;
    }
    sequence = gmem_vm_sequence(vm.handle);
    if (CHECK(sequence != NULL)) {
        CHECK(__atomic_load_n(sequence, __ATOMIC_ACQUIRE) != UINT64_MAX);
    }
    vm_close(&vm);
}

static unsigned last_calls;

/* What this thread has of its own in Rust is gone by now: glibc destroys it before all of these. */
static void last_call(void)
{
    if (FAILS(gmem_vm_end(NULL), EINVAL, "VM is NULL")
        && FAILS(gmem_block_free((struct gmem_block *)(uintptr_t)8), EINVAL, "block's handle is none")) {
        __atomic_fetch_add(&last_calls, 1, __ATOMIC_RELAXED);
    }
}

static void last_call_of_thread(void *unused)
{
    CHECK(unused != NULL);
    last_call();
}

static void *fail_and_end(void *key)
{
    FAILS(gmem_vm_end(NULL), EINVAL, "VM is NULL");
    CHECK(pthread_setspecific(*(pthread_key_t *)key, key) == 0);
    return NULL;
}

static void last_call_of_process(void)
{
    last_call();
    /* Not exit(), which may not be called again. */
    if (last_calls != 2) {
        printf("    %u of 2 destructors and exit handlers got through\n", last_calls);
        _exit(1);
    }
}

static void end_process(void)
{
    pthread_key_t key;
    pthread_t thread;

    CHECK(pthread_key_create(&key, last_call_of_thread) == 0);
    if (CHECK(pthread_create(&thread, NULL, fail_and_end, &key) == 0)) {
        pthread_join(thread, NULL);
    }
    FAILS(gmem_vm_new(-1, NULL), EINVAL, "NULL");
    CHECK(atexit(last_call_of_process) == 0);
    exit(0);
}

static void exit_handlers_may_call_and_hear_why_it_failed(void)
{
    int status = -1;
    pid_t child;

    fflush(stdout);
    child = fork();
    if (child == 0) {
        end_process();
    }
    if (CHECK(child > 0)) {
        CHECK(waitpid(child, &status, 0) == child);
        EQUAL(status, 0);
    }
}

static void the_version_has_three_numbers(void)
{
    unsigned numbers[3];
    char rest;

    EQUAL(sscanf(gmem_version(), "%u.%u.%u%c", numbers, numbers + 1, numbers + 2, &rest), 3);
}

static void a_guest_hears_three_things_only(void)
{
    static const int never_retry[] = { -EINVAL, -ENOSPC,  -EIO,    -EBUSY,  -EACCES,
                                       -ENOTSUP, INT_MIN, INT_MAX, 1,       EAGAIN };

    for (int can_retry = 0; can_retry < 2; can_retry++) {
        EQUAL(gmem_hypercall_result(0, can_retry != 0), 0);
        for (size_t i = 0; i < sizeof never_retry / sizeof *never_retry; i++) {
            EQUAL(gmem_hypercall_result(never_retry[i], can_retry != 0), EINVAL);
        }
    }
    EQUAL(gmem_hypercall_result(-EAGAIN, true), EAGAIN);
    EQUAL(gmem_hypercall_result(-ENOMEM, true), EAGAIN);
    EQUAL(gmem_hypercall_result(-EAGAIN, false), EINVAL);
    EQUAL(gmem_hypercall_result(-ENOMEM, false), EINVAL);
}

static void a_storm_of_senseless_requests_costs_nothing(void)
{
    const unsigned storm = 100000;
    unsigned before = messages(GMEM_LOG_WARN);
    struct gmem_vm_stats stats;
    uint64_t resident;
    struct vm vm;

    if (!vm_open(&vm)) {
        return;
    }
    /*
     * The allocator of the sanitizer takes its time to reach a steady size, for sentences of each
     * length anew.
     */
    for (unsigned i = 0; i < storm; i++) {
        gmem_convert(vm.handle, 0x100000000, PAGE, GMEM_PRIVATE);
        gmem_convert(vm.handle, i * PAGE + 1, PAGE, GMEM_PRIVATE);
    }
    resident = status_kib("VmRSS");
    for (unsigned i = 0; i < storm; i++) {
        gmem_convert(vm.handle, 0x100000000, PAGE, GMEM_PRIVATE);
        gmem_convert(vm.handle, i * PAGE + 1, PAGE, GMEM_PRIVATE);
    }
    CHECK(status_kib("VmRSS") < resident + 8 * 1024);
    stats = vm_stats(vm.handle);
    EQUAL(stats.requests, 4 * storm);
    EQUAL(stats.failures, 4 * storm);
    CHECK(stats.convert_ns_max > 0 && stats.convert_ns_max <= stats.convert_ns_total);
    CHECK(messages(GMEM_LOG_WARN) > before);
    CHECK(messages(GMEM_LOG_WARN) < before + 100);
    vm_close(&vm);
}

const struct test_case message_cases[] = {
    CASE(nothing_failed_so_far),
    CASE(the_log_has_one_receiver),
    CASE(a_new_block_says_what_was_chosen),
    CASE(errors_belong_to_their_thread_and_stay),
    CASE(a_verdict_has_a_sentence_of_its_own),
    CASE(a_sequence_is_a_vms),
    CASE(exit_handlers_may_call_and_hear_why_it_failed),
    CASE(the_version_has_three_numbers),
    CASE(a_guest_hears_three_things_only),
    CASE(a_storm_of_senseless_requests_costs_nothing),
    END_OF_CASES,
};
