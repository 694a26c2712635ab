// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sources of the C ABI, with the contracts of the library's items in their doc comments.
//!
//! Each public item has the contract of a Rust item or says why not; see [`Own`]. A field without a doc comment
//! has the contract of the field, or the method, of the same name in what its structure is for C, and a structure has
//! all of its fields.

use crate::doc::{at, Block, Doc};
use crate::own::Own;
use crate::rust_docs::{doc_lines, RustDocs};
use crate::words::{if_set, negate_errnos, Name, Names, Place};
use quote::ToTokens;
use syn::{parse_quote, Attribute, FnArg, Ident, Item, ItemStruct, Type, Visibility};

const WIDTH: usize = 100;

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

impl<'a> Entry<'a> {
    fn new(name: &Ident, attributes: &'a mut Vec<Attribute>, kind: Kind) -> Result<Self, String> {
        let own = at(name, Own::read(attributes))?;
        Ok(Self {
            name: name.to_string(),
            attributes,
            kind,
            own,
        })
    }
}

/// All public items of a file, and the public fields of its structures.
fn entries(file: &mut syn::File) -> Result<Vec<Entry<'_>>, String> {
    let mut entries = Vec::new();
    for item in &mut file.items {
        match item {
            Item::Fn(item) if is_public(&item.vis) => {
                let parameters = item.sig.inputs.iter().filter_map(|input| match input {
                    FnArg::Typed(input) => Some(input.pat.to_token_stream().to_string()),
                    FnArg::Receiver(_) => None,
                });
                let kind = Kind::Function {
                    parameters: parameters.collect(),
                };
                entries.push(Entry::new(&item.sig.ident, &mut item.attrs, kind)?);
            }
            Item::Const(item) if is_public(&item.vis) => {
                entries.push(Entry::new(&item.ident, &mut item.attrs, Kind::Constant)?);
            }
            Item::Type(item) if is_public(&item.vis) => {
                entries.push(Entry::new(&item.ident, &mut item.attrs, Kind::Other)?);
            }
            Item::Struct(item) if is_public(&item.vis) => entries.extend(structure(item)?),
            _ => {}
        }
    }
    Ok(entries)
}

fn is_public(vis: &Visibility) -> bool {
    matches!(vis, Visibility::Public(_))
}

/// A structure and its fields.
fn structure(item: &mut ItemStruct) -> Result<Vec<Entry<'_>>, String> {
    let name = item.ident.to_string();
    let fields = item.fields.iter_mut().filter(|field| is_public(&field.vis));
    let fields: Vec<_> = fields.collect();
    let kind = Kind::Structure {
        handle: fields.is_empty(),
    };
    let whole = Entry::new(&item.ident, &mut item.attrs, kind)?;
    let mut members = Vec::new();
    for field in fields {
        let kind = Kind::Field {
            of: name.clone(),
            parameters: callback_parameters(&field.ty),
            is_byte: field.ty.to_token_stream().to_string() == "u8",
        };
        let ident = field.ident.as_ref().ok_or("a field without a name")?;
        let mut member = Entry::new(ident, &mut field.attrs, kind)?;
        if doc_lines(member.attributes).is_empty() {
            let of = whole.own.contract.as_ref();
            let of = at(member.full_name(), of.ok_or("no doc comment".into()))?;
            member.own = Own::implied(of, &member.name);
        }
        members.push(member);
    }
    members.insert(0, whole);
    Ok(members)
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
        if self.own.begins {
            let first = match own.prose.is_empty() {
                true => return Err("begun anew, by nothing".into()),
                false => own.prose.remove(0),
            };
            match theirs.prose.first_mut() {
                Some(begin) => *begin = first,
                None => return Err(format!("{} begins with nothing", contract.path)),
            }
        }
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
    for entry in &all {
        if let (Kind::Structure { .. }, Some(contract)) = (&entry.kind, &entry.own.contract) {
            let fields = docs.fields_of(&contract.path);
            let missing = fields.filter(|field| !names.has(field));
            wrong.extend(missing.map(|field| format!("{}: nothing is {field} in C", entry.name)));
        }
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
    use crate::own::MOST_OWN_LINES;

    fn docs() -> RustDocs {
        let mut docs = RustDocs::default();
        docs.add(
            "block",
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
             /// What it is like.
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
    fn a_contract_that_c_begins_anew_goes_on_as_in_rust() {
        let function = |own: &str| {
            format!(
                "/// [`Block::bind`] for C, begun anew.
                 ///
                 {own}
                 #[no_mangle]
                 pub extern \"C\" fn gmem_bind(offset: u64) {{}}"
            )
        };
        let found = whole(&function("/// Shows it.\n///\n/// And more."));
        let expected = " Guest memory.
 Nobody's.
 Shows it.

 And more.

 -EEXIST: it is bound already.

 Nothing is bound then.";
        assert_eq!(found.unwrap(), expected);
        assert!(wrong(&function("///")).contains("begun anew, by nothing"));
    }

    #[test]
    fn fields_are_those_of_the_same_name_or_say_of_which() {
        let lines = whole(
            "/// [`Config`] for C.
             pub struct gmem_config {
                 /// sizeof this.
                 pub struct_size: usize,
                 pub size: u64,
                 /// [`Config::max_runs`] for C. Or so.
                 pub most: u64,
                 /// [`Config::reserve`] for C, turned round.
                 pub no_reserve: u8,
             }",
        );
        let expected = " Guest memory.
 Nobody's.
 What it is like.
 sizeof this.
 Bytes.
 Most runs. 0: as many as `size` allows. Or so.
 0: there is memory.";
        assert_eq!(lines.unwrap(), expected);
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
    fn a_structure_has_all_fields_of_what_it_is_for_c() {
        let error = wrong("/// [`Config`] for C.\npub struct gmem_config { pub size: u64 }");
        let missing = ["Config::max_runs", "Config::reserve"];
        let missing = missing.map(|field| format!("gmem_config: nothing is {field} in C"));
        assert_eq!(error, missing.join("\n"));
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
        assert!(error.contains("is Block::gone"), "{error}");
        let error = wrong(&format!("/// [`Block::bind`] for C.\n{function}"));
        assert!(
            error.contains("`offset` is no parameter or field in C"),
            "{error}"
        );
    }
}
