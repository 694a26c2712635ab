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

CARGO_TARGET_DIR=$target "$cargo" build --quiet --profile library --package gmem --features capi \
    --manifest-path "$source_dir/Cargo.toml"
archive=$target/library/libgmem.a

# The header is held to the library by a test, and is simpler to read than an archive.
undefined=$(grep -o 'gmem_[a-z_]*(' "$source_dir/include/gmem.h" | tr -d '(' | sort -u |
    sed 's/^/--undefined=/')
[ -n "$undefined" ] || { echo "$0: include/gmem.h declares no function" >&2; exit 1; }

object=${output%.a}.o
# Each standard library has a group of sections with the pointer to its personality routine. A linker
# keeps one group of a name and drops the others, even if the name is local: what unwinds here would
# follow the pointer of another library, or none. So there are no groups.
# shellcheck disable=SC2086 # one option a word
ld -r --force-group-allocation --gc-sections $undefined -o "$object.tmp" "$archive"
# The standard library's embedded bitcode is of no use to C, and an older LLVM plugin of binutils
# dies on it.
objcopy --wildcard --keep-global-symbol='gmem_*' \
    --remove-section=.llvmbc --remove-section=.llvmcmd "$object.tmp" "$object"
# What only dropped sections wanted is still undefined, and no longer weakly: functions of a later libc,
# which another Rust library takes if they are there, would have to be there then.
export LC_ALL=C
readelf --wide --relocs "$object" | awk 'NF >= 5 { print $5 }' | sort -u > "$object.named"
nm --undefined-only --format=posix "$object" | sed 's/ .*//' | sort |
    comm -23 - "$object.named" > "$object.weak"
# objcopy fails without a word if there are none.
[ ! -s "$object.weak" ] || objcopy --weaken-symbols="$object.weak" "$object"
rm -f "$object.tmp" "$object.named" "$object.weak" "$output"
ar rcs "$output" "$object"

# Cargo knows what it read; the build system wants to hear it.
sed "s|^[^:]*:|$output:|" "${archive%.a}.d" > "$depfile"
