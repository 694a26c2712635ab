// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the library's public items say of themselves, by type and name, whatever file they are in.

use std::collections::BTreeMap;
use std::path::Path;
use syn::{Attribute, Fields, ImplItem, Item, TraitItem, Visibility};

/// `Type`, `Type::member` or `function`, to the doc comments of all items that are called so, fields apart.
#[derive(Debug, Default)]
pub struct RustDocs {
    items: BTreeMap<String, Vec<Vec<String>>>,
    fields: BTreeMap<String, Vec<Vec<String>>>,
}

impl RustDocs {
    /// Of all files under `dir`, but for the C ABI's.
    pub fn in_dir(dir: &Path) -> Self {
        let mut docs = Self::default();
        docs.add_dir(dir);
        docs
    }

    fn add_dir(&mut self, dir: &Path) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.file_stem().is_some_and(|name| name == "capi") {
                continue;
            }
            if path.is_dir() {
                self.add_dir(&path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                self.add(&std::fs::read_to_string(&path).unwrap());
            }
        }
    }

    pub fn add(&mut self, source: &str) {
        syn::parse_file(source)
            .unwrap()
            .items
            .iter()
            .for_each(|item| self.add_item(item));
    }

    fn add_item(&mut self, item: &Item) {
        match item {
            Item::Fn(function) => self.note(&function.vis, &function.sig.ident, &function.attrs),
            Item::Struct(item) => {
                self.note(&item.vis, &item.ident, &item.attrs);
                if let Fields::Named(fields) = &item.fields {
                    for field in &fields.named {
                        if let Visibility::Public(_) = field.vis {
                            let name = field.ident.as_ref().unwrap();
                            let docs = self.fields.entry(format!("{}::{name}", item.ident));
                            docs.or_default().push(doc_lines(&field.attrs));
                        }
                    }
                }
            }
            Item::Enum(item) => {
                self.note(&item.vis, &item.ident, &item.attrs);
                for variant in &item.variants {
                    let name = format!("{}::{}", item.ident, variant.ident);
                    self.note(&item.vis, name, &variant.attrs);
                }
            }
            Item::Trait(item) => {
                self.note(&item.vis, &item.ident, &item.attrs);
                for function in &item.items {
                    if let TraitItem::Fn(function) = function {
                        let name = format!("{}::{}", item.ident, function.sig.ident);
                        self.note(&item.vis, name, &function.attrs);
                    }
                }
            }
            Item::Impl(item) if item.trait_.is_none() => {
                let syn::Type::Path(of) = &*item.self_ty else {
                    return;
                };
                let of = &of.path.segments.last().unwrap().ident;
                for function in &item.items {
                    if let ImplItem::Fn(function) = function {
                        let name = format!("{of}::{}", function.sig.ident);
                        self.note(&function.vis, name, &function.attrs);
                    }
                }
            }
            Item::Mod(item) => {
                let items = item.content.iter().flat_map(|(_, items)| items);
                items.for_each(|item| self.add_item(item));
            }
            _ => {}
        }
    }

    fn note(&mut self, vis: &Visibility, name: impl ToString, attributes: &[Attribute]) {
        if matches!(vis, Visibility::Public(_)) {
            let docs = self.items.entry(name.to_string()).or_default();
            docs.push(doc_lines(attributes));
        }
    }

    /// The public fields of a type, as `Type::field`.
    pub fn fields_of<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a str> {
        let prefix = format!("{name}::");
        let names = self.fields.keys().map(String::as_str);
        names.filter(move |field| field.starts_with(&prefix))
    }

    /// The lines of the one public item of that name; those of a field, if that may be meant.
    pub fn of(&self, name: &str, may_be_field: bool) -> Result<&[String], String> {
        let field = self.fields.get(name).filter(|_| may_be_field);
        match field.or(self.items.get(name)).map(Vec::as_slice) {
            Some([doc]) if !doc.is_empty() => Ok(doc),
            Some([_]) => Err(format!("{name} has no doc comment")),
            Some(several) => Err(format!("{} public items are {name}", several.len())),
            None => Err(format!("nothing public is {name}")),
        }
    }
}

/// The lines of a doc comment.
pub fn doc_lines(attributes: &[Attribute]) -> Vec<String> {
    let line = |attribute: &Attribute| {
        let syn::Meta::NameValue(meta) = &attribute.meta else {
            return None;
        };
        match &meta.value {
            syn::Expr::Lit(literal) if meta.path.is_ident("doc") => match &literal.lit {
                syn::Lit::Str(text) => Some(text.value()),
                _ => None,
            },
            _ => None,
        }
    };
    attributes.iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_found_by_type_and_name() {
        let mut docs = RustDocs::default();
        docs.add(
            "/// A.
             pub struct Block {
                 /// B.
                 pub size: u64,
                 /// Nobody's.
                 secret: u64,
             }
             impl Block {
                 /// C.
                 pub fn bind(&self) {}
                 /// Not the field.
                 pub fn size(&self) {}
                 /// Nobody's either.
                 pub(crate) fn hidden(&self) {}
             }
             /// D.
             pub trait Listener {
                 /// E.
                 fn begin(&self);
             }",
        );
        docs.add("/// F.\npub enum Path { /// G.\n Fd }\n/// H.\npub fn prepare() {}");
        let found = |name| docs.of(name, true).map(|lines| lines[0].trim().to_string());
        let names = [
            "Block",
            "Block::size",
            "Block::bind",
            "Listener",
            "Listener::begin",
            "Path",
            "Path::Fd",
            "prepare",
        ];
        let all: Vec<_> = names.iter().map(|name| found(name).unwrap()).collect();
        assert_eq!(all, ["A.", "B.", "C.", "D.", "E.", "F.", "G.", "H."]);
        assert!(found("Block::secret").is_err());
        assert!(found("Block::hidden").is_err());
    }

    #[test]
    fn a_name_that_two_items_have_is_no_name() {
        let mut docs = RustDocs::default();
        docs.add("/// A.\npub struct Block;");
        docs.add("/// B.\npub struct Block;\npub struct Bare;");
        assert!(docs
            .of("Block", false)
            .unwrap_err()
            .contains("2 public items"));
        assert!(docs
            .of("Bare", false)
            .unwrap_err()
            .contains("no doc comment"));
    }
}
