// SPDX-License-Identifier: MIT OR Apache-2.0
//! Rust's words in C's: links, names and numbers of a doc comment.

use std::collections::{BTreeMap, BTreeSet};

/// What C calls an item of the library.
#[derive(Clone, Debug, PartialEq)]
pub enum Name {
    Function(String),
    Constant(String),
    Field {
        of: String,
        name: String,
    },
    /// A structure that C fills or reads.
    Structure(String),
    /// A handle, which is called by what it stands for.
    Handle(String),
}

#[derive(Debug, Default)]
pub struct Names {
    by_path: BTreeMap<String, Name>,
    functions: BTreeSet<String>,
    fields: BTreeSet<String>,
}

/// Where a text stands in C.
#[derive(Clone, Debug, Default)]
pub struct Place<'a> {
    /// The Rust type that the text calls `Self`.
    pub self_type: &'a str,
    /// The C structure whose fields are called by their names alone.
    pub structure: &'a str,
    pub parameters: &'a [String],
}

impl Names {
    /// What `path` is in C. Twice is an error.
    pub fn add(&mut self, path: &str, name: Name) -> Result<(), String> {
        match self.by_path.insert(path.to_string(), name.clone()) {
            None => Ok(()),
            Some(other) => Err(format!("{path} is both {other:?} and {name:?} in C")),
        }
    }

    pub fn has(&self, path: &str) -> bool {
        self.by_path.contains_key(path)
    }

    pub fn add_function(&mut self, name: &str) {
        self.functions.insert(name.to_string());
    }

    pub fn add_field(&mut self, name: &str) {
        self.fields.insert(name.to_string());
    }

    /// What to write for a link, and whether it would follow a text in brackets.
    fn link(&self, path: &str, place: &Place) -> Result<(String, bool), String> {
        let path = path.trim_start_matches("crate::");
        if self.functions.contains(path) {
            return Ok((format!("{path}()"), true));
        }
        let path = match path.strip_prefix("Self::") {
            Some(member) => format!("{}::{member}", place.self_type),
            None => path.to_string(),
        };
        match self.by_path.get(&path) {
            Some(Name::Function(name)) => Ok((format!("{name}()"), true)),
            Some(Name::Constant(name)) => Ok((name.clone(), true)),
            Some(Name::Field { of, name }) if of == place.structure => {
                Ok((format!("`{name}`"), true))
            }
            Some(Name::Field { of, name }) => Ok((format!("{of}.{name}"), true)),
            Some(Name::Structure(name)) => Ok((format!("struct {name}"), true)),
            Some(Name::Handle(name)) => Ok((name.clone(), false)),
            None => self.all_of(&path),
        }
    }

    /// An enum is its constants.
    fn all_of(&self, path: &str) -> Result<(String, bool), String> {
        let members = format!("{path}::");
        let mut constants = Vec::new();
        for (_, name) in self
            .by_path
            .range(members.clone()..)
            .take_while(|(path, _)| path.starts_with(&members))
        {
            if let Name::Constant(name) = name {
                constants.push(name.as_str());
            }
        }
        match constants.as_slice() {
            [] => Err(format!("{path} has no name in C")),
            [a, b] => Ok((format!("{b} or {a}"), true)),
            [first, rest @ ..] => {
                let mut common = *first;
                while !rest.iter().all(|name| name.starts_with(common)) {
                    common = &common[..common.len() - 1];
                }
                let common = &common[..common.rfind('_').map_or(0, |end| end + 1)];
                Ok((format!("{common}…"), true))
            }
        }
    }

    /// What stands between backticks.
    fn code(&self, code: &str, place: &Place) -> Result<String, String> {
        match code {
            // No field has a default but zero.
            "None" => return Ok("0".into()),
            "u64::MAX" => return Ok("UINT64_MAX".into()),
            _ => {}
        }
        if code.contains("::") {
            return Ok(self.link(code, place)?.0);
        }
        // An option of the VMM's, a file, something of the kernel's, a call of somebody else's function.
        let foreign = code.contains(['=', '-', '/', '.', '(']);
        let known = self.fields.contains(code) || place.parameters.iter().any(|name| name == code);
        match foreign || known {
            true => Ok(format!("`{code}`")),
            false => Err(format!("`{code}` is no parameter or field in C")),
        }
    }

    /// A text as it is in C. What has no name there is an error.
    pub fn translate(&self, text: &str, place: &Place) -> Result<String, String> {
        let mut written = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['[', '`']) {
            written.push_str(&rest[..at]);
            let closing = if rest[at..].starts_with('[') {
                ']'
            } else {
                '`'
            };
            let inner = &rest[at + 1..];
            let Some(end) = inner.find(closing) else {
                return Err(format!("{closing} is missing after “{inner}”"));
            };
            let (inner, after) = (&inner[..end], &inner[end + 1..]);
            rest = after;
            if closing == '`' {
                written.push_str(&self.code(inner, place)?);
                continue;
            }
            let code = inner
                .strip_prefix('`')
                .and_then(|code| code.strip_suffix('`'));
            let target = after
                .strip_prefix('(')
                .and_then(|after| after.split_once(')'));
            if let Some((_, after)) = target {
                rest = after;
            }
            match (code, target) {
                (Some(path), target) => {
                    let path = target.map_or(path, |(path, _)| path);
                    written.push_str(&self.link(path, place)?.0);
                }
                (None, Some((path, _))) => {
                    written.push_str(inner);
                    let (name, follows) = self.link(path, place)?;
                    if follows {
                        written.push_str(&format!(" ({name})"));
                    }
                }
                (None, None) => return Err(format!("[{inner}] links to nothing")),
            }
        }
        written.push_str(rest);
        self.check_calls(&written)?;
        Ok(written)
    }

    /// Whatever looks like a function of the library is one: what builds the static library takes it for that.
    fn check_calls(&self, text: &str) -> Result<(), String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '(');
        for word in words {
            let called = word.trim_start_matches('(').split_once('(');
            if let Some((name, _)) = called {
                if name.starts_with("gmem_") && !self.functions.contains(name) {
                    return Err(format!("{name}() is no function of the header"));
                }
            }
        }
        Ok(())
    }
}

const ERRNOS: [&str; 17] = [
    "EACCES",
    "EADDRINUSE",
    "EAGAIN",
    "EBADF",
    "EBUSY",
    "EEXIST",
    "EFAULT",
    "EINVAL",
    "EIO",
    "EMFILE",
    "ENFILE",
    "ENOENT",
    "ENOMEM",
    "ENOSPC",
    "ENOTSUP",
    "ENOTTY",
    "EPERM",
];

/// C functions return errnos negated.
pub fn negate_errnos(text: &str) -> String {
    let mut written = String::new();
    let mut rest = text;
    while let Some(start) = rest.find(|c: char| c.is_ascii_alphanumeric()) {
        let (gap, from) = rest.split_at(start);
        let end = from
            .find(|c: char| !c.is_ascii_alphanumeric())
            .unwrap_or(from.len());
        let (word, after) = from.split_at(end);
        written.push_str(gap);
        if ERRNOS.contains(&word) && !gap.ends_with('-') {
            written.push('-');
        }
        written.push_str(word);
        rest = after;
    }
    written + rest
}

/// What a structure says that has a byte for yes and no: what `on` means. Rust says it as a sentence that is
/// true then.
pub fn if_set(on: u8, text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().unwrap_or_default();
    let is_name = letters.clone().next().is_some_and(char::is_uppercase);
    let first = if is_name {
        first
    } else {
        first.to_ascii_lowercase()
    };
    format!("{on}: {first}{}", letters.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        let mut names = Names::default();
        let field = |name: &str| Name::Field {
            of: "gmem_block_config".into(),
            name: name.into(),
        };
        for (path, name) in [
            ("Block::bind", Name::Function("gmem_bind".into())),
            ("BlockConfig", Name::Structure("gmem_block_config".into())),
            ("BlockConfig::release_delay", field("release_delay_ms")),
            ("Window", Name::Handle("window".into())),
            ("Attribute::Private", Name::Constant("GMEM_PRIVATE".into())),
            ("Attribute::Shared", Name::Constant("GMEM_SHARED".into())),
            ("DmaPath::Auto", Name::Constant("GMEM_DMA_AUTO".into())),
            ("DmaPath::Fd", Name::Constant("GMEM_DMA_FD".into())),
            ("DmaPath::Address", Name::Constant("GMEM_DMA_HVA".into())),
        ] {
            names.add(path, name).unwrap();
        }
        names.add_function("gmem_bind");
        names.add_function("gmem_last_error");
        names.add_field("max_runs");
        names
    }

    fn translated(text: &str) -> Result<String, String> {
        let place = Place {
            self_type: "Block",
            parameters: &["offset".to_string()],
            ..Place::default()
        };
        names().translate(text, &place)
    }

    #[test]
    fn links_are_names_of_c() {
        for (rust, c) in [
            ("as [`Block::bind`].", "as gmem_bind()."),
            ("as [`Block::bind`](crate::Block::bind).", "as gmem_bind()."),
            ("[`Self::bind`]", "gmem_bind()"),
            ("is [bound](Block::bind).", "is bound (gmem_bind())."),
            ("its [`Window`]s", "its windows"),
            ("its [DMA windows](Window)", "its DMA windows"),
            ("[`Attribute::Private`]", "GMEM_PRIVATE"),
            ("`Attribute::Private`", "GMEM_PRIVATE"),
            ("an [`Attribute`]", "an GMEM_SHARED or GMEM_PRIVATE"),
            ("[`DmaPath`]", "GMEM_DMA_…"),
            ("see [`BlockConfig`]", "see struct gmem_block_config"),
            ("[`gmem_last_error`]", "gmem_last_error()"),
        ] {
            assert_eq!(translated(rust).unwrap(), c);
        }
    }

    #[test]
    fn a_field_is_named_with_its_structure_elsewhere_only() {
        let text = "see [`BlockConfig::release_delay`]";
        assert_eq!(
            translated(text).unwrap(),
            "see gmem_block_config.release_delay_ms"
        );
        let place = Place {
            structure: "gmem_block_config",
            ..Place::default()
        };
        assert_eq!(
            names().translate(text, &place).unwrap(),
            "see `release_delay_ms`"
        );
    }

    #[test]
    fn code_is_what_c_has_too() {
        for (rust, c) in [
            ("`offset`", "`offset`"),
            ("past `max_runs`", "past `max_runs`"),
            ("with `u64::MAX`", "with UINT64_MAX"),
            ("`None`: none", "0: none"),
            ("if `dma-split=cut`", "if `dma-split=cut`"),
            ("by `load(p, ORDER)`", "by `load(p, ORDER)`"),
        ] {
            assert_eq!(translated(rust).unwrap(), c);
        }
    }

    #[test]
    fn what_c_does_not_have_is_an_error() {
        for text in [
            "[`Block::span`]",
            "[spans](Block::span)",
            "a [bracket]",
            "`release_delay`",
            "`Some`",
            "`Block::span`",
            "gmem_unknown()",
            "a `lone tick",
        ] {
            assert!(translated(text).is_err(), "{text}");
        }
    }

    #[test]
    fn two_names_for_one_thing_are_an_error() {
        let other = Name::Function("gmem_bind2".into());
        assert!(names().add("Block::bind", other).is_err());
    }

    #[test]
    fn errnos_are_negative_in_c() {
        assert_eq!(
            negate_errnos("EINVAL, -EIO: EBUSY's (ENOMEM, EAGAIN) S-EPT EHWPOISON"),
            "-EINVAL, -EIO: -EBUSY's (-ENOMEM, -EAGAIN) S-EPT EHWPOISON"
        );
    }

    #[test]
    fn a_byte_for_yes_and_no_says_what_it_means() {
        assert_eq!(
            if_set(1, "Devices may read only."),
            "1: devices may read only."
        );
        assert_eq!(if_set(0, "KVM has it."), "0: KVM has it.");
    }
}
