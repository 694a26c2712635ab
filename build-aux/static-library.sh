#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Builds libgmem.a: one relocatable object whose only global symbols are gmem_*.
#
# A plain Rust static library brings the symbols of its standard library along, and a program that
# links two of them (QEMU with --enable-rust or igvm) gets each twice. Here they are resolved inside
# the object and then made local.
#
# usage: static-library.sh SOURCE-DIR OUTPUT.a DEPFILE
# environment: CARGO, CARGO_TARGET_DIR
set -eu
source_dir=$1
output=$2
depfile=$3
cargo=${CARGO:-cargo}
target=${CARGO_TARGET_DIR:-$(dirname "$output")/cargo}

CARGO_TARGET_DIR=$target "$cargo" build --quiet --profile library --package gmem \
    --manifest-path "$source_dir/Cargo.toml"
archive=$target/library/libgmem.a

# The header is held to the library by a test, and is simpler to read than an archive.
undefined=$(grep -o 'gmem_[a-z_]*(' "$source_dir/include/gmem.h" | tr -d '(' | sort -u |
    sed 's/^/--undefined=/')
[ -n "$undefined" ] || { echo "$0: include/gmem.h declares no function" >&2; exit 1; }

object=${output%.a}.o
# shellcheck disable=SC2086 # one option a word
ld -r --gc-sections $undefined -o "$object.tmp" "$archive"
# The standard library's embedded bitcode is of no use to C, and an older LLVM plugin of binutils
# dies on it.
objcopy --wildcard --keep-global-symbol='gmem_*' \
    --remove-section=.llvmbc --remove-section=.llvmcmd "$object.tmp" "$object"
rm -f "$object.tmp" "$output"
ar rcs "$output" "$object"

# Cargo knows what it read; the build system wants to hear it.
sed "s|^[^:]*:|$output:|" "${archive%.a}.d" > "$depfile"
