// SPDX-License-Identifier: MIT OR Apache-2.0
//! The C ABI as C and C++ programs see it: `tests/capi/*.c`, compiled as C11 and as C++17 with
//! every warning an error, under the address and undefined-behaviour sanitizers, against the static
//! library in the form that QEMU links.

mod common;

use common::skipped;
use std::env::consts::ARCH;
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

/// A static library in libgmem.a's form, made the way that meson.build makes it.
fn made_by_the_script(source: &Path, library: PathBuf) -> PathBuf {
    std::fs::create_dir_all(library.parent().unwrap()).unwrap();
    succeed(
        Command::new(root().join("build-aux/static-library.sh"))
            .args([source, &library, &library.with_extension("d")])
            .env("CARGO", env!("CARGO"))
            .env("CARGO_TARGET_DIR", library.with_file_name("cargo"))
            // What was asked of the tests' own build is not asked of the library's.
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS"),
    );
    library
}

/// libgmem.a.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| made_by_the_script(root(), scratch().join("libgmem.a")))
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

/// tests/capi/panics.rs as `gmem_caught`, in libgmem.a's form.
fn panicking_library() -> PathBuf {
    let source = scratch().join("panics");
    std::fs::create_dir_all(source.join("include")).unwrap();
    let header = "int gmem_caught(int index);\n";
    std::fs::write(source.join("include/gmem.h"), header).unwrap();
    let manifest = format!(
        "[package]\nname = \"gmem\"\nedition = \"2021\"\n\
         [lib]\npath = {:?}\ncrate-type = [\"staticlib\"]\n\
         [features]\ndefault = [\"gmem\"]\ngmem = []\ncapi = []\n\
         [profile.library]\ninherits = \"release\"\nlto = \"fat\"\ncodegen-units = 1\n\
         [workspace]\n",
        root().join("tests/capi/panics.rs")
    );
    std::fs::write(source.join("Cargo.toml"), manifest).unwrap();
    made_by_the_script(&source, source.join("libpanics.a"))
}

/// The same as `second_caught`, as rustc makes a static library, with all its symbols.
fn second_library() -> PathBuf {
    let library = scratch().join("libsecond.a");
    // The one that the library's own build would take, so that both bring the same standard library.
    let rustc = Path::new(env!("CARGO")).with_file_name("rustc");
    succeed(
        Command::new(rustc)
            .args(["--edition=2021", "--crate-type=staticlib", "-O", "-o"])
            .arg(&library)
            .arg(root().join("tests/capi/panics.rs")),
    );
    library
}

/// Where gcc finds a linker, if anywhere: lld comes with Rust where the system has none.
fn linker(name: &str, test: &str) -> Option<Vec<String>> {
    let choice = format!("-fuse-ld={name}");
    let works = |arguments: &[String]| {
        Command::new("gcc")
            .args(arguments)
            .arg("-Wl,--version")
            .output()
    };
    let rust = Path::new(env!("CARGO")).parent()?.parent()?;
    let host = format!("lib/rustlib/{}-unknown-linux-gnu/bin/gcc-ld", ARCH);
    let from_rust = format!("-B{}", rust.join(host).display());
    let found = [vec![choice.clone()], vec![from_rust, choice]]
        .into_iter()
        .find(|arguments| works(arguments).is_ok_and(|output| output.status.success()));
    if found.is_none() {
        skipped(test, format_args!("there is no ld.{name}"));
    }
    found
}

/// QEMU with --enable-rust is such a program. A group of sections that both have (the pointer to the
/// personality routine) made one order not link, and took that pointer from under a panic in others.
#[test]
fn two_rust_libraries_catch_their_panics_in_one_program() {
    let test = "two_rust_libraries_catch_their_panics_in_one_program";
    if !has("gcc", test) || !has("objcopy", test) {
        return;
    }
    let mut libraries = [
        library().to_path_buf(),
        panicking_library(),
        second_library(),
    ];
    for name in ["bfd", "gold", "lld"] {
        let Some(linker) = linker(name, &format!("{test}/{name}")) else {
            continue;
        };
        for _ in 0..2 {
            libraries.reverse();
            let program = scratch().join(format!("two_{name}"));
            succeed(
                Command::new("gcc")
                    .args(&linker)
                    .arg("-I")
                    .arg(root().join("include"))
                    .arg(root().join("tests/capi/two_libraries.c"))
                    .args(&libraries)
                    .args(["-lpthread", "-lm", "-ldl", "-o"])
                    .arg(&program),
            );
            println!("{}", succeed(&mut Command::new(&program)));
        }
    }
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
