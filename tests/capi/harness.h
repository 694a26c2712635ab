/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The tests of the C ABI, in C: compiled as C11 and as C++17 by tests/capi.rs.
 */
#ifndef GMEM_TEST_HARNESS_H
#define GMEM_TEST_HARNESS_H

#include <errno.h>
#include <gmem.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096ull
#define MIB (1024 * 1024ull)

struct test_case {
    const char *name;
    void (*run)(void);
};

#define CASE(name) { #name, name }
#define END_OF_CASES { NULL, NULL }

extern const struct test_case config_cases[];
extern const struct test_case handle_cases[];
extern const struct test_case range_cases[];
extern const struct test_case window_cases[];
extern const struct test_case message_cases[];

/* A check that fails is reported and the case goes on: what follows must bear it. */
#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
#define EQUAL(left, right) \
    check_equal((uint64_t)(left), (uint64_t)(right), #left " == " #right, __FILE__, __LINE__)
#define OK(call) check_ok((call), #call, __FILE__, __LINE__)
/* The call returns -error, and gmem_last_error() is a sentence that contains `part`. */
#define FAILS(call, error, part) check_error((call), (error), (part), #call, __FILE__, __LINE__)

bool check(bool holds, const char *what, const char *file, int line);
bool check_equal(uint64_t left, uint64_t right, const char *what, const char *file, int line);
bool check_ok(int result, const char *what, const char *file, int line);
bool check_error(int result, int error, const char *part, const char *what, const char *file,
                 int line);

/* Ends the case's claim to have tested anything. */
void skip(const char *reason);

/* What is open and mapped in this process. */
unsigned open_files(void);
unsigned shared_mappings(void);
/* A line of /proc/self/status, in KiB. */
uint64_t status_kib(const char *name);

/* A default-type VM, and the library's handle of it. */
struct vm {
    int fd;
    struct gmem_vm *handle;
};

/* False after skip(): there is no /dev/kvm. */
bool vm_open(struct vm *vm);
/* False after skip(): no /dev/kvm, or its guest_memfd can't be an ordinary VM's memory. */
bool vm_open_in_place(struct vm *vm);
void vm_close(struct vm *vm);

/* Structures that are all zero but for their size and what the arguments say. */
struct gmem_block_config block_config(uint64_t size);
struct gmem_window_config window_config(int iommufd, uint64_t offset, uint64_t length);
struct gmem_memslot memslot(void);
struct gmem_block_stats block_stats(const struct gmem_block *block);
struct gmem_vm_stats vm_stats(const struct gmem_vm *vm);

/* NULL after a failed check. */
struct gmem_block *block_new(const struct vm *vm, const char *name, uint64_t size);

/* What the log callback, installed before any case, has seen. */
unsigned messages(uint32_t level);

#endif
