/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A program of several Rust static libraries, each with a standard library of its own. */
#include <gmem.h>
#include <stdio.h>
#include <string.h>

/* tests/capi/panics.rs, in libgmem.a's form and as rustc makes it. */
int gmem_caught(int index);
int second_caught(int index);

int main(void)
{
    int ours = gmem_caught(9);
    int theirs = second_caught(9);
    int error = gmem_vm_free((struct gmem_vm *)16);

    printf("caught %d and %d, error %d: %s\n", ours, theirs, error, gmem_last_error());
    return ours > 0 && ours == theirs && error < 0 && strlen(gmem_last_error()) > 0 ? 0 : 1;
}
