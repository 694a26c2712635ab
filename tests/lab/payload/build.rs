// SPDX-License-Identifier: MIT OR Apache-2.0
//! The link flags of a bare-metal ELF; here rather than in RUSTFLAGS, which a caller's environment would replace.

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo:rerun-if-changed=link.ld");
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        &format!("-Wl,-T,{directory}/link.ld"),
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
