#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# sanitized-tests.sh address|valgrind [ARGUMENT OF cargo test...]
#
# The library's tests under AddressSanitizer, which also looks for leaks, or valgrind's memcheck: minutes, and
# so no part of `cargo test`. Miri would be the better one for the pure parts, but is to be had from rustup
# alone, and runs no system calls of the kind that this is about. The C ABI's tests in C are under the address
# and undefined-behaviour sanitizers of the C compiler always.
set -eu

kind=$1
shift
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/$kind"
host=$(rustc -vV | sed -n 's/^host: //p')
case $kind in
address)
    # A flag of nightly compilers; build scripts and macros, which are for the host, go without.
    export RUSTC_BOOTSTRAP=1
    export RUSTFLAGS="${RUSTFLAGS:-} -Zsanitizer=address -Cdebug-assertions -Coverflow-checks"
    # Tests whose kernel in memory calls them, and which it has: what such a circle holds is the tests' own.
    circles=$(mktemp)
    trap 'rm -f "$circles"' EXIT
    cat >"$circles" <<END
leak:a_cut_that_reached_another_ioas_is_no_success
leak:no_access_is_allowed_while_memory_is_hidden
leak:neighbours_that_a_quarantine_loses_are_quarantined_too
END
    export LSAN_OPTIONS="suppressions=$circles:print_suppressions=0"
    ;;
valgrind)
    # Fewer cases of random tests: each instruction takes fifty times as long. One test says where the kernel is
    # to place a mapping, and valgrind places it elsewhere: `-- --skip addresses_stay_reserved`.
    export PROPTEST_CASES="${PROPTEST_CASES:-5}"
    runner=CARGO_TARGET_$(echo "$host" | tr 'a-z-' 'A-Z_')_RUNNER
    export "$runner=valgrind --quiet --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite"
    ;;
*)
    echo "sanitized-tests.sh: address or valgrind, not $kind" >&2
    exit 2
    ;;
esac
cargo test --package gmem --target "$host" "$@"
