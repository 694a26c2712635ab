// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a doc comment of the C ABI says itself, and of whose contract.
//!
//! ``[`Block::bind`] for C.`` at its beginning: the contract is that of this Rust item, and what follows is C's own.
//! ``[`Block::file`] for C, begun anew.``: that one's first paragraph is C's own, where C has other functions.
//! ``Only in C: …``: there is none, and this is why. That paragraph is not for the header.

use crate::doc::{Block, Doc};
use crate::rust_docs::{doc_lines, RustDocs};
use crate::words::negate_errnos;
use syn::Attribute;

/// What C adds to a contract is short: else it is one of its own.
pub const MOST_OWN_LINES: usize = 5;

/// What a doc comment of the C ABI says of its contract.
#[derive(Debug, Default)]
pub struct Own {
    pub contract: Option<Contract>,
    /// Goes on in the contract's last paragraph.
    pub continues: bool,
    /// C's own comes in the place of the contract's first paragraph.
    pub begins: bool,
    pub doc: Doc,
    only_in_c: bool,
    lines: usize,
}

#[derive(Debug)]
pub struct Contract {
    pub path: String,
    /// C's byte says the opposite of what Rust's does.
    pub turned_round: bool,
}

impl Own {
    pub fn read(attributes: &[Attribute]) -> Result<Self, String> {
        let mut lines = doc_lines(attributes);
        let mut own = Own::default();
        if let Some((path, rest)) = lines.first().and_then(|line| marker(line)) {
            let turned = rest.strip_prefix(", turned round.");
            own.contract = Some(Contract {
                path: path.to_string(),
                turned_round: turned.is_some(),
            });
            let anew = rest.strip_prefix(", begun anew.");
            own.begins = anew.is_some();
            let rest = turned.or(anew).or(rest.strip_prefix('.'));
            let rest = rest.ok_or("“for C” without its full stop")?.to_string();
            own.continues =
                !rest.trim().is_empty() || lines.get(1).is_some_and(|line| !line.trim().is_empty());
            lines[0] = rest;
        }
        own.doc = Doc::parse(&lines)?;
        let doc = &mut own.doc;
        let before = doc.blocks().count();
        for section in [&mut doc.prose, &mut doc.errors, &mut doc.safety] {
            section.retain(|block| !block.text().starts_with("Only in C: "));
        }
        own.only_in_c = doc.blocks().count() != before;
        let before_safety = lines.iter().take_while(|line| line.trim() != "# Safety");
        let is_text = |line: &&String| !line.trim().is_empty() && !line.starts_with(" # ");
        own.lines = before_safety.filter(is_text).count();
        Ok(own)
    }

    /// That of the field, or the method, that is called `name` in what the structure names.
    pub fn implied(of: &Contract, name: &str) -> Self {
        Own {
            contract: Some(Contract {
                path: format!("{}::{name}", of.path),
                turned_round: false,
            }),
            ..Own::default()
        }
    }

    /// What is wrong with it as the doc comment of an item that C's programs see.
    pub fn check(&self, docs: &RustDocs, is_field: bool) -> Result<(), String> {
        let Some(contract) = &self.contract else {
            return match self.only_in_c {
                true => Ok(()),
                false => Err("neither a contract in Rust nor “Only in C: ” and why".into()),
            };
        };
        if self.only_in_c {
            return Err("a contract in Rust, and “Only in C: ”".into());
        }
        if self.lines > MOST_OWN_LINES {
            return Err(format!(
                "{} lines besides the contract of {}",
                self.lines, contract.path
            ));
        }
        let theirs = errnos(&Doc::parse(docs.of(&contract.path, is_field)?)?);
        match errnos(&self.doc).iter().find(|own| theirs.contains(own)) {
            None => Ok(()),
            Some(errno) => Err(format!(
                "{errno} is in the contract of {} already",
                contract.path
            )),
        }
    }
}

/// Those that a text names, but for what C alone has to vouch for.
fn errnos(doc: &Doc) -> Vec<String> {
    let texts = doc.prose.iter().chain(&doc.errors).map(Block::text);
    let words = texts.flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric()));
    let errnos = words.filter(|word| negate_errnos(word) != *word);
    errnos.map(str::to_string).collect()
}

/// ``[`path`] for C``, with or without where that is, and what follows.
fn marker(line: &str) -> Option<(&str, &str)> {
    let (path, rest) = line.trim().strip_prefix("[`")?.split_once("`]")?;
    let rest = match rest.strip_prefix('(') {
        Some(place) => place.split_once(')')?.1,
        None => rest,
    };
    Some((path, rest.strip_prefix(" for C")?))
}
