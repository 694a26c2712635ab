// SPDX-License-Identifier: MIT OR Apache-2.0
//! include/gmem.h is what cbindgen makes of the C ABI today.
//!
//! `GMEM_UPDATE_HEADER=1 cargo test --test header` writes it.

use std::path::Path;

fn generated() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/capi/structs.rs"))
        .with_src(root.join("src/capi.rs"))
        .with_src(root.join("src/capi/vm.rs"))
        .with_src(root.join("src/capi/block.rs"))
        .with_src(root.join("src/capi/window.rs"))
        .with_src(root.join("src/capi/listener.rs"))
        .generate()
        .unwrap();
    let mut header = Vec::new();
    bindings.write(&mut header);
    String::from_utf8(header).unwrap()
}

#[test]
fn the_header_is_in_sync() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/gmem.h");
    let generated = generated();
    if std::env::var_os("GMEM_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        checked_in == generated,
        "include/gmem.h is stale: GMEM_UPDATE_HEADER=1 cargo test --test header"
    );
}
