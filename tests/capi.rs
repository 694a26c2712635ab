// SPDX-License-Identifier: MIT OR Apache-2.0
//! The C ABI as C and C++ programs see it: `tests/capi/*.c`, compiled as C11 and as C++17 with
//! every warning an error, under the address and undefined-behaviour sanitizers, against the static
//! library in the form that QEMU links.

mod common;

use common::skipped;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const SOURCES: [&str; 6] = [
    "harness.c",
    "config.c",
    "handles.c",
    "messages.c",
    "ranges.c",
    "windows.c",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn scratch() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn succeed(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = text(&output);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{text}",
        output.status
    );
    text
}

/// libgmem.a, made the way that meson.build makes it.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        std::fs::create_dir_all(scratch()).unwrap();
        let library = scratch().join("libgmem.a");
        succeed(
            Command::new(root().join("build-aux/static-library.sh"))
                .args([root(), &library, &scratch().join("libgmem.d")])
                .env("CARGO", env!("CARGO"))
                .env("CARGO_TARGET_DIR", scratch().join("cargo"))
                // What was asked of the tests' own build is not asked of the library's.
                .env_remove("RUSTFLAGS")
                .env_remove("CARGO_ENCODED_RUSTFLAGS"),
        );
        library
    })
}

/// Whether the tool is there; if not, that is said.
fn has(tool: &str, test: &str) -> bool {
    let there = Command::new(tool).arg("--version").output().is_ok();
    if !there {
        skipped(test, format_args!("there is no {tool}"));
    }
    there
}

/// Compiles the C tests as one language and runs them.
fn run(compiler: &str, language: &[&str], name: &str) {
    let test = format!("the_c_abi_works_from_{name}");
    if !has(compiler, &test) || !has("objcopy", &test) {
        return;
    }
    let program = scratch().join(name);
    let library = library();
    succeed(
        Command::new(compiler)
            .args(language)
            .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-g", "-O1"])
            .args(["-D_GNU_SOURCE", "-pthread"])
            .args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
            .arg("-I")
            .arg(root().join("include"))
            .args(SOURCES.map(|source| root().join("tests/capi").join(source)))
            // So that what follows is an archive again, and not a source in this language.
            .args(["-x", "none"])
            .arg(library)
            .args(["-lpthread", "-lm", "-ldl", "-o"])
            .arg(&program),
    );
    let output = Command::new(&program)
        .arg(format!("capi_{name}"))
        // Freed memory that is kept for detection looks like a leak to the tests of memory use.
        .env("ASAN_OPTIONS", "quarantine_size_mb=8")
        .output()
        .unwrap();
    let text = text(&output);
    for line in text.lines() {
        let skip = line.strip_prefix("SKIPPED ");
        if let Some((case, reason)) = skip.and_then(|skip| skip.split_once(": ")) {
            skipped(case, reason);
        }
    }
    assert!(output.status.success(), "{}\n{text}", output.status);
    println!("{text}");
}

#[test]
fn the_c_abi_works_from_c11() {
    run("gcc", &["-std=c11", "-x", "c"], "c11");
}

#[test]
fn the_c_abi_works_from_cxx17() {
    run("g++", &["-std=c++17", "-x", "c++"], "cxx17");
}

/// Two Rust static libraries in one program would clash over the standard library's symbols.
#[test]
fn the_static_library_shows_gmem_symbols_alone() {
    let test = "the_static_library_shows_gmem_symbols_alone";
    if !has("objcopy", test) || !has("nm", test) {
        return;
    }
    let symbols = succeed(
        Command::new("nm")
            .args(["--extern-only", "--defined-only", "--format=posix"])
            .arg(library()),
    );
    let mut shown: Vec<&str> = symbols
        .lines()
        .filter(|line| !line.ends_with(':'))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let header = std::fs::read_to_string(root().join("include/gmem.h")).unwrap();
    let mut declared: Vec<&str> = header
        .lines()
        .filter(|line| !line.starts_with([' ', '/', '#']))
        .filter_map(|line| line.split('(').next())
        .filter_map(|line| line.split([' ', '*']).next_back())
        .filter(|name| name.starts_with("gmem_") && header.contains(&format!("{name}(")))
        .collect();
    declared.sort_unstable();
    shown.sort_unstable();
    assert!(declared.len() > 20, "{declared:?}");
    assert_eq!(shown, declared);
}
