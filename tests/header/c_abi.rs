// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sources of the C ABI, with the contracts of the library's items in their doc comments.
//!
//! An item of the C ABI whose doc comment begins with ``[`Block::bind`] for C.`` has the contract that the
//! Rust item has, and what follows is C's own. A field without a doc comment has that of the field, or the
//! method, of the same name in what its structure names. What has no contract in Rust says why, in
//! a paragraph ``Only in C: …`` that is not for the header.

use crate::doc::{at, Block, Doc};
use crate::rust_docs::{doc_lines, RustDocs};
use crate::words::{if_set, negate_errnos, Name, Names, Place};
use quote::ToTokens;
use syn::{parse_quote, Attribute, Fields, FnArg, Item, Pat, Type, Visibility};

/// What C adds to a contract is short: else it is one of its own.
const MOST_OWN_LINES: usize = 5;

const WIDTH: usize = 100;

/// What a doc comment of the C ABI says of its contract.
#[derive(Debug, Default)]
struct Own {
    contract: Option<Contract>,
    /// Goes on in the contract's last paragraph.
    continues: bool,
    doc: Doc,
    only_in_c: bool,
    lines: usize,
}

#[derive(Debug)]
struct Contract {
    path: String,
    /// C's byte says the opposite of what Rust's does.
    turned_round: bool,
}

impl Own {
    fn read(attributes: &[Attribute]) -> Result<Self, String> {
        let mut lines = doc_lines(attributes);
        let mut own = Own::default();
        if let Some((path, rest)) = lines.first().and_then(|line| marker(line)) {
            let turned = rest.strip_prefix(", turned round.");
            own.contract = Some(Contract {
                path: path.to_string(),
                turned_round: turned.is_some(),
            });
            let rest = turned.or(rest.strip_prefix('.'));
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
    fn implied(of: &Contract, name: &str) -> Self {
        Own {
            contract: Some(Contract {
                path: format!("{}::{name}", of.path),
                turned_round: false,
            }),
            ..Own::default()
        }
    }

    /// What is wrong with it as the doc comment of an item that C's programs see.
    fn check(&self, docs: &RustDocs, is_field: bool) -> Result<(), String> {
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
        let theirs = Doc::parse(docs.of(&contract.path, is_field)?)?;
        let errnos = |doc: &Doc| -> Vec<String> {
            let text: String = doc
                .blocks()
                .map(|block| format!("{} ", block.text()))
                .collect();
            let words = text.split(|c: char| !c.is_ascii_alphanumeric());
            let errnos = words.filter(|word| negate_errnos(word) != *word);
            errnos.map(str::to_string).collect()
        };
        let theirs = errnos(&theirs);
        match errnos(&self.doc)
            .iter()
            .find(|errno| theirs.contains(errno))
        {
            None => Ok(()),
            Some(errno) => Err(format!(
                "{errno} is in the contract of {} already",
                contract.path
            )),
        }
    }
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

/// One of the C ABI's items, or a field of one.
struct Entry<'a> {
    name: String,
    attributes: &'a mut Vec<Attribute>,
    kind: Kind,
    own: Own,
}

enum Kind {
    Function {
        parameters: Vec<String>,
    },
    Constant,
    Other,
    /// Opaque, or with fields.
    Structure {
        handle: bool,
    },
    Field {
        of: String,
        parameters: Vec<String>,
        is_byte: bool,
    },
}

fn entries<'a>(file: &'a mut syn::File) -> Result<Vec<Entry<'a>>, String> {
    let mut entries = Vec::new();
    for item in &mut file.items {
        let (vis, name) = match &item {
            Item::Fn(item) => (&item.vis, item.sig.ident.to_string()),
            Item::Struct(item) => (&item.vis, item.ident.to_string()),
            Item::Const(item) => (&item.vis, item.ident.to_string()),
            Item::Type(item) => (&item.vis, item.ident.to_string()),
            _ => continue,
        };
        if !matches!(vis, Visibility::Public(_)) {
            continue;
        }
        let entry = |name: String, attributes: &'a mut Vec<Attribute>, kind| -> Result<_, String> {
            let own = at(&name, Own::read(attributes))?;
            Ok(Entry {
                name,
                attributes,
                kind,
                own,
            })
        };
        match item {
            Item::Fn(item) => {
                let parameters = item.sig.inputs.iter().filter_map(|input| match input {
                    FnArg::Typed(input) => match &*input.pat {
                        Pat::Ident(name) => Some(name.ident.to_string()),
                        _ => None,
                    },
                    FnArg::Receiver(_) => None,
                });
                let kind = Kind::Function {
                    parameters: parameters.collect(),
                };
                entries.push(entry(name, &mut item.attrs, kind)?);
            }
            Item::Const(item) => entries.push(entry(name, &mut item.attrs, Kind::Constant)?),
            Item::Type(item) => entries.push(entry(name, &mut item.attrs, Kind::Other)?),
            Item::Struct(item) => {
                let Fields::Named(fields) = &mut item.fields else {
                    return Err(format!("{name} has no fields"));
                };
                let public = fields
                    .named
                    .iter_mut()
                    .filter(|field| matches!(field.vis, Visibility::Public(_)));
                let public: Vec<_> = public.collect();
                let structure = entry(
                    name,
                    &mut item.attrs,
                    Kind::Structure {
                        handle: public.is_empty(),
                    },
                )?;
                let mut members = Vec::new();
                for field in public {
                    let kind = Kind::Field {
                        of: structure.name.clone(),
                        parameters: callback_parameters(&field.ty),
                        is_byte: field.ty.to_token_stream().to_string() == "u8",
                    };
                    let name = field.ident.as_ref().unwrap().to_string();
                    let mut member = entry(name, &mut field.attrs, kind)?;
                    if member
                        .attributes
                        .iter()
                        .all(|attribute| !attribute.path().is_ident("doc"))
                    {
                        let Some(of) = &structure.own.contract else {
                            return Err(format!("{}: no doc comment", member.name));
                        };
                        member.own = Own::implied(of, &member.name);
                    }
                    members.push(member);
                }
                entries.push(structure);
                entries.extend(members);
            }
            _ => {}
        }
    }
    Ok(entries)
}

/// Of `Option<unsafe extern "C" fn(…)>`.
fn callback_parameters(ty: &Type) -> Vec<String> {
    let Type::Path(path) = ty else {
        return Vec::new();
    };
    let syn::PathArguments::AngleBracketed(inner) = &path.path.segments.last().unwrap().arguments
    else {
        return Vec::new();
    };
    match inner.args.first() {
        Some(syn::GenericArgument::Type(Type::BareFn(function))) => {
            let names = function
                .inputs
                .iter()
                .filter_map(|input| input.name.as_ref());
            names.map(|(name, _)| name.to_string()).collect()
        }
        _ => Vec::new(),
    }
}

impl Entry<'_> {
    fn full_name(&self) -> String {
        match &self.kind {
            Kind::Field { of, .. } => format!("{of}.{}", self.name),
            _ => self.name.clone(),
        }
    }

    fn is_field(&self) -> bool {
        matches!(self.kind, Kind::Field { .. })
    }

    fn is_struct_size(&self) -> bool {
        self.name == "struct_size"
    }

    fn add_to(&self, names: &mut Names) -> Result<(), String> {
        match &self.kind {
            Kind::Function { .. } => names.add_function(&self.name),
            Kind::Field { .. } => names.add_field(&self.name),
            _ => {}
        }
        let Some(contract) = &self.own.contract else {
            return Ok(());
        };
        let name = self.name.clone();
        let name = match &self.kind {
            Kind::Function { .. } => Name::Function(name),
            Kind::Constant => Name::Constant(name),
            Kind::Field { of, .. } => Name::Field {
                of: of.clone(),
                name,
            },
            Kind::Structure { handle: true } => {
                Name::Handle(name.trim_start_matches("gmem_").to_string())
            }
            Kind::Structure { handle: false } => Name::Structure(name),
            Kind::Other => return Ok(()),
        };
        names.add(&contract.path, name)
    }

    /// The whole comment, for C.
    fn comment(&self, docs: &RustDocs, names: &Names) -> Result<Vec<String>, String> {
        let mut place = Place::default();
        let mut width = WIDTH - " * ".len();
        match &self.kind {
            Kind::Function { parameters } => place.parameters = parameters,
            Kind::Structure { .. } => place.structure = &self.name,
            Kind::Field { of, parameters, .. } => {
                place.structure = of;
                place.parameters = parameters;
                width -= 2;
            }
            Kind::Constant | Kind::Other => {}
        }
        let own = self.in_c(&self.own.doc, names, &place)?;
        let Some(contract) = &self.own.contract else {
            return Ok(own.lines(width));
        };
        place.self_type = match &self.kind {
            Kind::Structure { .. } => &contract.path,
            _ => contract.path.split("::").next().unwrap(),
        };
        let is_field = self.is_field();
        let theirs = Doc::parse(docs.of(&contract.path, is_field)?)?;
        let mut theirs = at(&contract.path, self.in_c(&theirs, names, &place))?;
        if let Kind::Function { .. } = self.kind {
            theirs.prose = negated(&theirs.prose);
        }
        if let (Kind::Field { is_byte: true, .. }, Some(Block::Paragraph(text))) =
            (&self.kind, theirs.prose.first_mut())
        {
            *text = if_set(u8::from(!contract.turned_round), text);
        }
        let mut own = own;
        if self.own.continues && !own.prose.is_empty() {
            if let Some(Block::Paragraph(text)) = theirs.prose.last_mut() {
                text.push(' ');
                text.push_str(own.prose.remove(0).text());
            }
        }
        Ok(theirs.join(own).lines(width))
    }

    fn in_c(&self, doc: &Doc, names: &Names, place: &Place) -> Result<Doc, String> {
        let translate = |block: &Block| block.map(|text| names.translate(text, place));
        let all = |blocks: &[Block]| blocks.iter().map(translate).collect::<Result<Vec<_>, _>>();
        Ok(Doc {
            prose: all(&doc.prose)?,
            errors: negated(&all(&doc.errors)?),
            safety: all(&doc.safety)?,
        })
    }
}

fn negated(blocks: &[Block]) -> Vec<Block> {
    let negate = |block: &Block| match block {
        Block::Paragraph(text) => Block::Paragraph(negate_errnos(text)),
        Block::Item(text) => Block::Item(negate_errnos(text)),
    };
    blocks.iter().map(negate).collect()
}

/// The sources with whole comments, and what C calls things; or all that is wrong with them.
pub fn with_contracts(
    texts: &[String],
    docs: &RustDocs,
) -> Result<(Vec<String>, Names), Vec<String>> {
    let mut files: Vec<_> = texts
        .iter()
        .map(|text| syn::parse_file(text).unwrap())
        .collect();
    let mut names = Names::default();
    let mut wrong = Vec::new();
    let mut all = Vec::new();
    for file in &mut files {
        match entries(file) {
            Ok(entries) => all.extend(entries),
            Err(error) => wrong.push(error),
        }
    }
    for entry in &all {
        let checked = match entry.is_struct_size() {
            true => Ok(()),
            false => entry.own.check(docs, entry.is_field()),
        };
        let named = checked.and(entry.add_to(&mut names));
        wrong.extend(at(entry.full_name(), named).err());
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    for entry in all {
        match at(entry.full_name(), entry.comment(docs, &names)) {
            Ok(lines) => {
                entry
                    .attributes
                    .retain(|attribute| !attribute.path().is_ident("doc"));
                for line in lines {
                    let line = match line.is_empty() {
                        true => line,
                        false => format!(" {line}"),
                    };
                    entry.attributes.push(parse_quote!(#[doc = #line]));
                }
            }
            Err(error) => wrong.push(error),
        }
    }
    match wrong.is_empty() {
        true => {
            let texts = files.iter().map(|file| file.to_token_stream().to_string());
            Ok((texts.collect(), names))
        }
        false => Err(wrong),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn docs() -> RustDocs {
        let mut docs = RustDocs::default();
        docs.add(
            "/// Guest memory.
             pub struct Block;
             impl Block {
                 /// Shows `offset` of a [`Block`] to [`Attribute::Private`] guests, or fails with EBUSY.
                 ///
                 /// # Errors
                 /// - EEXIST: it is bound already.
                 ///
                 /// Nothing is bound then.
                 pub fn bind(&self) {}
             }
             pub struct Config {
                 /// Most runs. `None`: as many as [`Self::size`] allows.
                 pub max_runs: Option<u64>,
                 /// Bytes.
                 pub size: u64,
                 /// There is memory.
                 pub reserve: bool,
             }
             /// Private or not.
             pub enum Attribute {
                 /// Nobody's.
                 Private,
             }",
        );
        docs
    }

    const TYPES: &str = "
        /// [`Block`] for C.
        pub struct gmem_block { _opaque: [u8; 0] }
        /// [`Attribute::Private`] for C.
        pub const GMEM_PRIVATE: u32 = 1;";

    fn whole(source: &str) -> Result<String, Vec<String>> {
        let source = format!("{TYPES}{source}");
        let (texts, _) = with_contracts(&[source], &docs())?;
        // One doc line each, without what is around it.
        let lines = texts[0]
            .split("doc = \"")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap());
        Ok(lines.map(str::trim_end).collect::<Vec<_>>().join("\n"))
    }

    fn wrong(source: &str) -> String {
        whole(source).unwrap_err().join("\n")
    }

    #[test]
    fn a_contract_is_the_rust_docs_in_c_and_what_c_adds() {
        let found = whole(
            "/// [`Block::bind`](crate::Block::bind) for C. Ends some time.
             ///
             /// Once.
             ///
             /// # Errors
             /// - EINVAL: not in C.
             ///
             /// # Safety
             /// All is well.
             #[no_mangle]
             pub unsafe extern \"C\" fn gmem_bind(offset: u64) {}",
        );
        let expected = " Guest memory.
 Nobody's.
 Shows `offset` of a block to GMEM_PRIVATE guests, or fails with -EBUSY. Ends some time.

 Once.

 -EEXIST: it is bound already.
 -EINVAL: not in C.

 Nothing is bound then.

 All is well.";
        assert_eq!(found.unwrap(), expected);
    }

    #[test]
    fn fields_are_those_of_the_same_name_or_say_of_which() {
        let mut all = docs();
        all.add("/// What it is like.\npub struct Other { /// A.\n pub size: u64 }");
        let source = format!(
            "{TYPES}
            /// [`Other`] for C.
            pub struct gmem_other {{ /// sizeof this.
                pub struct_size: usize,
                pub size: u64,
                /// [`Config::max_runs`] for C. Or so.
                pub max_runs: u64,
                /// [`Config::reserve`] for C, turned round.
                pub no_reserve: u8 }}"
        );
        let error = with_contracts(std::slice::from_ref(&source), &all).unwrap_err();
        assert_eq!(
            error,
            ["gmem_other.max_runs: Config::max_runs: Config::size has no name in C"]
        );
        let named = source.replace(
            "pub size: u64",
            "/// [`Config::size`] for C.\n pub size: u64",
        );
        let (texts, _) = with_contracts(&[named], &all).unwrap();
        for line in [
            "\" Most runs. 0: as many as `size` allows. Or so.\"",
            "\" 0: there is memory.\"",
            "\" Bytes.\"",
        ] {
            assert!(texts[0].contains(line), "{line} in {}", texts[0]);
        }
    }

    #[test]
    fn what_has_no_contract_says_why() {
        let function = "#[no_mangle] pub extern \"C\" fn gmem_version() {}";
        assert!(wrong(function).contains("gmem_version: neither a contract"));
        let reason = format!("/// It.\n///\n/// Only in C: so.\n{function}");
        assert_eq!(whole(&reason).unwrap(), " Guest memory.\n Nobody's.\n It.");
        let both = format!("/// [`Block::bind`] for C.\n///\n/// Only in C: so.\n{function}");
        assert!(wrong(&both).contains("a contract in Rust, and"));
    }

    #[test]
    fn no_contract_is_written_twice() {
        let function = "#[no_mangle] pub extern \"C\" fn gmem_bind(offset: u64) {}";
        let errno = "/// [`Block::bind`] for C.\n/// # Errors\n/// - EEXIST: so.\n";
        let error = wrong(&format!("{errno}{function}"));
        assert!(
            error.contains("EEXIST is in the contract of Block::bind already"),
            "{error}"
        );
        let long = "/// And more.\n".repeat(MOST_OWN_LINES + 1);
        let error = wrong(&format!("/// [`Block::bind`] for C.\n{long}{function}"));
        assert!(error.contains("lines besides the contract"), "{error}");
    }

    #[test]
    fn a_contract_that_is_not_there_is_an_error() {
        let function = "#[no_mangle] pub extern \"C\" fn gmem_gone() {}";
        let error = wrong(&format!("/// [`Block::gone`] for C.\n{function}"));
        assert!(error.contains("nothing public is Block::gone"), "{error}");
        let error = wrong(&format!("/// [`Block::bind`] for C.\n{function}"));
        assert!(
            error.contains("`offset` is no parameter or field in C"),
            "{error}"
        );
    }
}
