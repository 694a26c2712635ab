// SPDX-License-Identifier: MIT OR Apache-2.0
//! A doc comment as sections of paragraphs and list items, and back as lines for a C comment.

use std::fmt::Display;

#[derive(Clone, Debug, PartialEq)]
pub enum Block {
    Paragraph(String),
    Item(String),
}

impl Block {
    pub fn text(&self) -> &str {
        let (Block::Paragraph(text) | Block::Item(text)) = self;
        text
    }

    pub fn map<E>(&self, change: impl FnOnce(&str) -> Result<String, E>) -> Result<Self, E> {
        Ok(match self {
            Block::Paragraph(text) => Block::Paragraph(change(text)?),
            Block::Item(text) => Block::Item(change(text)?),
        })
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Doc {
    pub prose: Vec<Block>,
    pub errors: Vec<Block>,
    /// What a caller in C has to vouch for.
    pub safety: Vec<Block>,
}

/// Sections that say nothing to C.
const RUST_ONLY: [&str; 3] = ["In Rust", "Example", "Lock order"];

impl Doc {
    /// Reads the lines of `///`, without these.
    pub fn parse<L: AsRef<str>>(lines: &[L]) -> Result<Self, String> {
        let mut doc = Self::default();
        let mut dropped = Vec::new();
        let mut section = &mut doc.prose;
        let mut for_c = true;
        let mut fresh = true;
        // In an example for Rust, whose hidden lines look like headings.
        let mut in_code = false;
        for line in lines {
            let line = line.as_ref().trim();
            let fence = line.starts_with("```");
            if !for_c && (fence || in_code) {
                in_code ^= fence;
                continue;
            }
            if let Some(heading) = line.strip_prefix("# ") {
                for_c = !RUST_ONLY.contains(&heading);
                section = match heading {
                    "Errors" => &mut doc.errors,
                    "Safety" => &mut doc.safety,
                    _ if !for_c => &mut dropped,
                    other => return Err(format!("what a section “{other}” is in C")),
                };
                fresh = true;
            } else if line.is_empty() {
                fresh = true;
            } else if line.starts_with('|') || line.starts_with("```") || line.starts_with('#') {
                if for_c {
                    return Err(format!("how “{line}” is written in C"));
                }
            } else if let Some(item) = line.strip_prefix("- ") {
                section.push(Block::Item(item.to_string()));
                fresh = false;
            } else {
                match section.last_mut() {
                    Some(Block::Paragraph(text) | Block::Item(text)) if !fresh => {
                        text.push(' ');
                        text.push_str(line);
                    }
                    _ => section.push(Block::Paragraph(line.to_string())),
                }
                fresh = false;
            }
        }
        Ok(doc)
    }

    pub fn blocks(&self) -> impl Iterator<Item = &Block> {
        let sections = [&self.prose, &self.errors, &self.safety];
        sections.into_iter().flatten()
    }

    /// The contract, and what C adds to it.
    pub fn join(mut self, own: Self) -> Self {
        self.prose.extend(own.prose);
        // Errnos by name, then all others; what follows is true after any.
        self.errors.extend(own.errors);
        self.errors.sort_by_key(|block| match block {
            Block::Item(text) => usize::from(text.starts_with("Another ")),
            Block::Paragraph(_) => 2,
        });
        self.safety.extend(own.safety);
        self
    }

    /// As lines of `width` characters at most, unless one word is longer.
    pub fn lines(&self, width: usize) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        let mut in_list = false;
        for block in self.blocks() {
            let (text, indent) = match block {
                Block::Paragraph(text) => (text, ""),
                Block::Item(text) => (text, "  "),
            };
            let is_item = matches!(block, Block::Item(_));
            let follows_item = std::mem::replace(&mut in_list, is_item);
            let is_first = lines.is_empty();
            if !is_first && (!is_item || !follows_item) {
                lines.push(String::new());
            }
            wrap(text, width, indent, &mut lines);
        }
        lines
    }
}

/// Appends the lines of a text, all but the first indented.
pub fn wrap(text: &str, width: usize, indent: &str, lines: &mut Vec<String>) {
    let mut line = String::new();
    for word in text.split_whitespace() {
        let length = line.chars().count() + 1 + word.chars().count();
        if line.trim().is_empty() {
            line.push_str(word);
        } else if length <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(std::mem::replace(&mut line, format!("{indent}{word}")));
        }
    }
    lines.push(line);
}

/// Puts in front what is wrong.
pub fn at<T>(place: impl Display, result: Result<T, String>) -> Result<T, String> {
    result.map_err(|error| format!("{place}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_told_apart_and_what_is_for_rust_is_left_out() {
        let doc = Doc::parse(&[
            "One",
            "line.",
            "",
            "Two.",
            "# In Rust",
            "| not | this |",
            "```",
            "# use of::a::hidden::line;",
            "```",
            "# Errors",
            "- EINVAL: a",
            "  b.",
            "- EIO: c.",
            "",
            "Nothing is left.",
        ])
        .unwrap();
        assert_eq!(
            doc.lines(80),
            [
                "One line.",
                "",
                "Two.",
                "",
                "EINVAL: a b.",
                "EIO: c.",
                "",
                "Nothing is left."
            ]
        );
    }

    #[test]
    fn what_has_no_form_in_c_is_an_error() {
        assert!(Doc::parse(&["# Panics", "Never."]).is_err());
        assert!(Doc::parse(&["| a | table |"]).is_err());
    }

    #[test]
    fn lines_are_wrapped_and_items_hang() {
        let doc = Doc::parse(&["aaa bbb ccc", "", "- ddd eee fff ggg"]).unwrap();
        assert_eq!(doc.lines(9), ["aaa bbb", "ccc", "", "ddd eee", "  fff ggg"]);
    }

    #[test]
    fn what_is_true_after_any_error_comes_last() {
        let rust = [
            "# Errors",
            "- EIO: a.",
            "- Another errno is d.",
            "",
            "All is as before.",
        ];
        let own = ["# Errors", "- EINVAL: b."];
        let [rust, own] = [&rust[..], &own].map(|lines| Doc::parse(lines).unwrap());
        assert_eq!(
            rust.join(own).lines(80),
            [
                "EIO: a.",
                "EINVAL: b.",
                "Another errno is d.",
                "",
                "All is as before."
            ]
        );
    }
}
