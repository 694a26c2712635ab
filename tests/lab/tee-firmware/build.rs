// SPDX-License-Identifier: MIT OR Apache-2.0
//! The link flags of a bare-metal ELF; here rather than in RUSTFLAGS, which a caller's environment would replace.

use std::path::Path;

fn main() {
    let variable = |name| std::env::var(name).expect("cargo sets it");
    // Beside what is built: clones of the project share that, and cargo takes a path into another clone, which
    // may be gone, for as good as one into this.
    let script = Path::new(&variable("OUT_DIR")).join("link.ld");
    let source = Path::new(&variable("CARGO_MANIFEST_DIR")).join("link.ld");
    std::fs::copy(source, &script).expect("a file of this package, and cargo's own folder");
    println!("cargo:rerun-if-changed=link.ld");
    println!("cargo:rerun-if-changed=build.rs");
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        &format!("-Wl,-T,{}", script.display()),
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
