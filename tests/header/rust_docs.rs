// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the library's public items say of themselves, by type and name, whatever file they are in.

use std::collections::BTreeMap;
use std::path::Path;
use syn::{Attribute, Fields, ImplItem, Item, TraitItem, UseTree, Visibility};

/// The doc comments of public items. Two modules may have items of one name: then the one is meant that the
/// crate shows.
#[derive(Debug, Default)]
pub struct RustDocs {
    /// By `Type`, `Type::member` or `function`.
    items: BTreeMap<String, Vec<Found>>,
    /// By `Type::field`, which may be a method, too.
    fields: BTreeMap<String, Vec<Found>>,
    /// From which of its modules the crate shows something.
    shown: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Found {
    /// Of the crate's root.
    module: String,
    lines: Vec<String>,
}

impl RustDocs {
    /// Of all files of a crate, but for the C ABI's.
    pub fn in_dir(src: &Path) -> Self {
        let mut docs = Self::default();
        for entry in std::fs::read_dir(src).unwrap() {
            let path = entry.unwrap().path();
            let module = path.file_stem().unwrap().to_str().unwrap();
            if module != "capi" {
                docs.add_files(module, &path);
            }
        }
        docs
    }

    fn add_files(&mut self, module: &str, path: &Path) {
        if path.is_dir() {
            for entry in std::fs::read_dir(path).unwrap() {
                self.add_files(module, &entry.unwrap().path());
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            self.add(module, &std::fs::read_to_string(path).unwrap());
        }
    }

    /// What a file of `module` has; `lib` is the crate's root.
    pub fn add(&mut self, module: &str, source: &str) {
        for item in &syn::parse_file(source).unwrap().items {
            match item {
                Item::Use(item) if module == "lib" && is_public(&item.vis) => {
                    if let UseTree::Path(path) = &item.tree {
                        self.show(&path.ident.to_string(), &path.tree);
                    }
                }
                _ => self.add_item(module, item),
            }
        }
    }

    fn show(&mut self, module: &str, names: &UseTree) {
        match names {
            UseTree::Name(name) => {
                self.shown
                    .insert(name.ident.to_string(), module.to_string());
            }
            UseTree::Group(group) => group.items.iter().for_each(|name| self.show(module, name)),
            UseTree::Path(path) => self.show(module, &path.tree),
            UseTree::Rename(_) | UseTree::Glob(_) => {}
        }
    }

    fn add_item(&mut self, module: &str, item: &Item) {
        match item {
            Item::Fn(function) => {
                self.note(module, &function.vis, &function.sig.ident, &function.attrs)
            }
            Item::Struct(item) => {
                self.note(module, &item.vis, &item.ident, &item.attrs);
                if let Fields::Named(fields) = &item.fields {
                    for field in &fields.named {
                        if is_public(&field.vis) {
                            let name = field.ident.as_ref().unwrap();
                            let docs = self.fields.entry(format!("{}::{name}", item.ident));
                            docs.or_default().push(Found::of(module, &field.attrs));
                        }
                    }
                }
            }
            Item::Enum(item) => {
                self.note(module, &item.vis, &item.ident, &item.attrs);
                for variant in &item.variants {
                    let name = format!("{}::{}", item.ident, variant.ident);
                    self.note(module, &item.vis, name, &variant.attrs);
                }
            }
            Item::Trait(item) => {
                self.note(module, &item.vis, &item.ident, &item.attrs);
                for function in &item.items {
                    if let TraitItem::Fn(function) = function {
                        let name = format!("{}::{}", item.ident, function.sig.ident);
                        self.note(module, &item.vis, name, &function.attrs);
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
                        self.note(module, &function.vis, name, &function.attrs);
                    }
                }
            }
            Item::Mod(item) => {
                let items = item.content.iter().flat_map(|(_, items)| items);
                items.for_each(|item| self.add_item(module, item));
            }
            _ => {}
        }
    }

    fn note(&mut self, module: &str, vis: &Visibility, name: impl ToString, of: &[Attribute]) {
        if is_public(vis) {
            let docs = self.items.entry(name.to_string()).or_default();
            docs.push(Found::of(module, of));
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
        let found = field.or(self.items.get(name));
        let mut found: Vec<&Found> = found.into_iter().flatten().collect();
        if found.len() > 1 {
            let shown = self.shown.get(name.split("::").next().unwrap());
            found.retain(|found| Some(&found.module) == shown);
        }
        match found.as_slice() {
            [found] if !found.lines.is_empty() => Ok(&found.lines),
            [_] => Err(format!("{name} has no doc comment")),
            [] => Err(format!("nothing public, or no one thing, is {name}")),
            several => Err(format!("{} public items are {name}", several.len())),
        }
    }
}

impl Found {
    fn of(module: &str, attributes: &[Attribute]) -> Self {
        Self {
            module: module.to_string(),
            lines: doc_lines(attributes),
        }
    }
}

fn is_public(vis: &Visibility) -> bool {
    matches!(vis, Visibility::Public(_))
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
            "block",
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
        docs.add(
            "dma",
            "/// F.\npub enum Path { /// G.\n Fd }\n/// H.\npub fn prepare() {}",
        );
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
    fn of_two_items_of_one_name_the_one_is_meant_that_the_crate_shows() {
        let mut docs = RustDocs::default();
        docs.add(
            "dma",
            "/// A.\npub struct Window;\nimpl Window { /// A.\n pub fn end(&self) {} }",
        );
        docs.add(
            "block",
            "/// B.\npub struct Window;\nimpl Window { /// B.\n pub fn end(&self) {} }",
        );
        assert!(docs.of("Window", false).is_err());
        docs.add(
            "lib",
            "pub use block::{Block, windows::Window};\npub use dma::prepare;",
        );
        assert_eq!(docs.of("Window", false).unwrap(), [" B."]);
        assert_eq!(docs.of("Window::end", false).unwrap(), [" B."]);
    }

    #[test]
    fn a_name_that_two_items_have_is_no_name() {
        let mut docs = RustDocs::default();
        docs.add("block", "/// A.\npub struct Block;\npub struct Bare;");
        docs.add("block", "/// B.\npub struct Block;");
        docs.add("lib", "pub use block::Block;");
        assert!(docs
            .of("Block", false)
            .unwrap_err()
            .contains("2 public items"));
        assert!(docs
            .of("Bare", false)
            .unwrap_err()
            .contains("no doc comment"));
        assert!(docs
            .of("Gone", false)
            .unwrap_err()
            .contains("nothing public"));
    }
}
