// SPDX-License-Identifier: MIT OR Apache-2.0
//! include/gmem.h is what cbindgen makes of the C ABI today, with the contracts of the library's own items.
//!
//! `GMEM_UPDATE_HEADER=1 cargo test --test header` writes it.

mod c_abi;
mod doc;
mod own;
mod rust_docs;
mod words;

use std::path::{Path, PathBuf};
use words::{Names, Place};

/// In the order of the header.
const SOURCES: [&str; 6] = ["structs", "", "vm", "block", "window", "listener"];

fn sources() -> Vec<PathBuf> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let file = |name: &str| match name {
        "" => src.join("capi.rs"),
        name => src.join(format!("capi/{name}.rs")),
    };
    SOURCES.into_iter().map(file).collect()
}

fn generated() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = rust_docs::RustDocs::in_dir(&root.join("src"));
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
    let sources: Vec<String> = sources().into_iter().map(read).collect();
    let front_page = read(root.join("src/lib.rs"));
    let (texts, names) = c_abi::with_contracts(&sources, &docs).unwrap_or_else(|all| wrong(&all));
    let words = words_of(&front_page, &names).unwrap_or_else(|error| wrong(&[error]));
    let threads = threads_of(&front_page, &names).unwrap_or_else(|error| wrong(&[error]));
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("header");
    std::fs::create_dir_all(&scratch).unwrap();
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    for (number, text) in texts.iter().enumerate() {
        let file = scratch.join(format!("{number}.rs"));
        std::fs::write(&file, text).unwrap();
        builder = builder.with_src(file);
    }
    let bindings = builder.generate().unwrap();
    let mut header = Vec::new();
    bindings.write(&mut header);
    String::from_utf8(header)
        .unwrap()
        .replace(" * @threads@\n", &threads)
        .replace(" * @words@\n", &words)
}

fn wrong(all: &[String]) -> ! {
    panic!("the C ABI's comments:\n{}", all.join("\n"))
}

/// What stands under a heading of the front page.
fn section_of<'a>(front_page: &'a str, heading: &'a str) -> impl Iterator<Item = &'a str> {
    let lines = front_page
        .lines()
        .filter_map(|line| line.strip_prefix("//!"));
    let section = lines.skip_while(move |line| line.trim() != heading).skip(1);
    section
        .map(str::trim)
        .take_while(|line| !line.starts_with('#'))
}

/// Who may call when, as the front page has it, for the head of the header.
fn threads_of(front_page: &str, names: &Names) -> Result<String, String> {
    let section: Vec<_> = section_of(front_page, "# Threads, signals, fork(2)").collect();
    let mut text = doc::Doc::parse(&section)?;
    for block in &mut text.prose {
        *block = block.map(|text| names.translate(text, &Place::default()))?;
    }
    let lines = text.lines(97).into_iter();
    let written: String = lines
        .map(|line| format!(" * {line}").trim_end().to_string() + "\n")
        .collect();
    match written.is_empty() {
        true => Err("the front page says nothing of threads".into()),
        false => Ok(written),
    }
}

/// The table of words on the library's front page, for the head of the header.
fn words_of(front_page: &str, names: &Names) -> Result<String, String> {
    let section = section_of(front_page, "# Words");
    let rows = section.filter_map(|line| {
        let row = line.strip_prefix("| ")?.strip_suffix(" |")?;
        row.split_once(" | ")
    });
    let mut written = String::new();
    // After the head and what is under it.
    for (word, meaning) in rows.skip(2) {
        let translate = |text: &str| names.translate(&text.replace('*', ""), &Place::default());
        let word = doc::at(word, translate(word))?;
        let mut lines = Vec::new();
        doc::wrap(&doc::at(&word, translate(meaning))?, 80, "", &mut lines);
        // What a linked word is called in C is said further down.
        let mut word = word.split(" (").next().unwrap();
        for line in lines {
            written += &format!(" *   {word:12} {line}\n");
            word = "";
        }
    }
    Ok(written)
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

/// Others than QEMU read it, and nobody may pass a NULL because what is a question of safety in Rust sounded
/// like leave to.
#[test]
fn the_header_speaks_to_any_vmm() {
    let header = generated();
    let foreign = ["QEMU", "dma-split", "max-r", "convert-unit", "hugetlbsize"];
    for words in foreign
        .into_iter()
        .chain(["is NULL or points", "are NULL or point"])
    {
        let line = header.lines().find(|line| line.contains(words));
        assert_eq!(line, None, "{words}");
    }
}
