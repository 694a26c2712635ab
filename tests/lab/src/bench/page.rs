// SPDX-License-Identifier: MIT OR Apache-2.0
//! docs/bench.md: its generated parts, between markers; the text around them is written by hand.

use super::cases;
use super::plots;
use super::summary::{Judged, Summary};
use anyhow::{bail, Context, Result};
use std::path::{Path, PathBuf};

/// Writes the generated parts anew.
pub fn update(
    path: &Path,
    summary: &Summary,
    pictures: &[(&str, &str)],
    stock_patches: &[PathBuf],
) -> Result<()> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
    let text = replace(&text, "goals", &goals(summary))?;
    let text = replace(&text, "figures", &figures(summary))?;
    let text = replace(&text, "in place", &summary.planes.markdown())?;
    let text = replace(&text, "pictures", &images(pictures))?;
    let text = replace(&text, "stock", &diff(stock_patches)?)?;
    let text = replace(&text, "run", &summary.run)?;
    std::fs::write(path, text).with_context(|| format!("can't write {}", path.display()))
}

/// `text` with what is between the markers of `name` replaced.
fn replace(text: &str, name: &str, content: &str) -> Result<String> {
    let begin = format!("<!-- {name}: generated -->\n");
    let end = format!("<!-- end of {name} -->");
    let found = text
        .split_once(&begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let Some((before, after)) = found else {
        bail!("docs/bench.md has no part {begin}…{end}");
    };
    Ok(format!(
        "{before}{begin}{}\n{end}{after}",
        content.trim_end()
    ))
}

/// One row for each goal.
pub fn goals(summary: &Summary) -> String {
    let mut text =
        String::from("| case | what | goal | measured | |\n| --- | --- | --- | --- | --- |\n");
    for row in &summary.rows {
        for (index, goal) in row.goals.iter().enumerate() {
            let name = match (index, cases::kind(&row.name)) {
                (0, Some(kind)) => format!("`{}`: {}", row.name, kind.what),
                (0, None) => format!("`{}`: the library by itself", row.name),
                _ => String::new(),
            };
            text.push_str(&format!(
                "| {name} | {} | {} | {} | {} |\n",
                goal.what,
                goal.limit.text(),
                measured(goal),
                if goal.met() { "met" } else { "**missed**" },
            ));
        }
        if let Some(error) = &row.error {
            text.push_str(&format!("| | not measured: {error} | | | |\n"));
        }
    }
    text
}

pub fn measured(goal: &Judged) -> String {
    goal.measured.map_or("–".into(), plots::short)
}

/// All figures of all cases.
fn figures(summary: &Summary) -> String {
    let mut text = String::from(
        "| case | side | time, median (min to max) | p50 | p99 | map | unmap | attributes | other calls | slab |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for row in &summary.rows {
        let Some(case) = &row.case else { continue };
        let json = case.json();
        let mut first = true;
        for side in ["stock", "gmem", "bare"] {
            let Some(seconds) = case.figure(side, "seconds") else {
                continue;
            };
            let figure = |name: &str, show: fn(f64) -> String| {
                case.figure(side, name).map_or("–".into(), show)
            };
            let end = |name: &str| json.get(side).and_then(|side| side[name].as_f64());
            let spread = match (end("seconds_min"), end("seconds_max")) {
                (Some(least), Some(most)) => {
                    format!(" ({} to {})", time(least), time(most))
                }
                _ => String::new(),
            };
            let name = if first {
                format!("`{}`", case.name)
            } else {
                String::new()
            };
            first = false;
            text.push_str(&format!(
                "| {name} | {side} | {}{spread} | {} | {} | {} | {} | {} | {} | {} |\n",
                time(seconds),
                figure("p50_us", plots::microseconds),
                figure("p99_us", plots::microseconds),
                figure("map_ioctls", plots::thousands),
                figure("unmap_ioctls", plots::thousands),
                figure("attr_ioctls", plots::thousands),
                figure("other_syscalls", plots::thousands),
                figure("slab_bytes", plots::bytes),
            ));
        }
    }
    text
}

fn time(seconds: f64) -> String {
    plots::microseconds(seconds * 1e6)
}

fn images(pictures: &[(&str, &str)]) -> String {
    pictures
        .iter()
        .map(|(name, caption)| format!("![{caption}](bench/{name})\n\n"))
        .collect()
}

/// The patches that change stock's own path, whole.
fn diff(patches: &[PathBuf]) -> Result<String> {
    let mut text = String::new();
    for patch in patches {
        let content = std::fs::read_to_string(patch)
            .with_context(|| format!("can't read {}", patch.display()))?;
        // From the first file on: what is above is a letter.
        let hunks = content.find("diff --git").map_or("", |at| &content[at..]);
        let hunks = hunks.split("\n-- \n").next().unwrap_or_default();
        text.push_str(&format!("```diff\n{}\n```\n", hunks.trim_end()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let text = "a\n<!-- x: generated -->\nold\n<!-- end of x -->\nb\n";
        let new = replace(text, "x", "new\n").unwrap();
        assert_eq!(new, "a\n<!-- x: generated -->\nnew\n<!-- end of x -->\nb\n");
        assert_eq!(replace(&new, "x", "new").unwrap(), new);
        assert!(replace(text, "y", "new").is_err());
    }
}
