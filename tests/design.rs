// SPDX-License-Identifier: MIT OR Apache-2.0
//! docs/design.md leads from a message to its place: each that it names is there.

use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn design() -> String {
    read("docs/design.md")
}

/// ``[…](../path) `name` `` as it stands in a cell.
fn place(cell: &str) -> (PathBuf, &str) {
    let (_, rest) = cell.split_once("](../").expect("a link");
    let (path, rest) = rest.split_once(')').unwrap();
    (path.into(), rest.trim().trim_matches('`'))
}

/// The sources, with strings that go on in the next line in one piece, and all white space as one blank.
fn sources(dir: &Path, text: &mut String) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, text),
            false => text.push_str(&read(path).replace("\\\n", " ")),
        }
    }
}

#[test]
fn messages_are_made_where_the_design_says() {
    let mut all = String::new();
    sources(&root().join("src"), &mut all);
    let blank = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let all = blank(&all);
    let stats = read("src/stats.rs");
    let design = design();
    let rows = design
        .lines()
        .skip_while(|line| !line.starts_with("| it says |"));
    let rows = rows.skip(2).take_while(|line| line.starts_with('|'));
    let mut count = 0;
    for row in rows {
        count += 1;
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [says, made, counted, _, held] = cells[..] else {
            panic!("{row}");
        };
        // What ranges and attributes print is not in the sentence's own string.
        let says = ["gpa", "offset", "private:", "private "]
            .iter()
            .fold(says.to_string(), |says, printed| says.replace(printed, "…"));
        for words in says.split(['*', '…']).map(str::trim) {
            let words = words.trim_matches([',', ';', ':', ' ']);
            if words.len() > 2 {
                assert!(all.contains(words), "nothing says “{words}”: {row}");
            }
        }
        let (file, name) = place(made);
        assert!(read(file).contains(&format!("fn {name}(")), "{row}");
        let counters = counted
            .split(['`', ',', ' ', '—'])
            .filter(|name| !name.is_empty());
        for counter in counters {
            assert!(stats.contains(&format!("pub {counter}: u64")), "{counter}");
        }
        let (file, name) = place(held);
        assert!(read(file).contains(&format!("{name}(")), "{row}");
    }
    assert!(count > 20, "{count}");
}

/// What it quotes as an example is made, as a test says.
#[test]
fn the_sentence_of_the_design_is_a_real_one() {
    let design = design();
    let (_, after) = design.split_once("when somebody asks for it: `").unwrap();
    let (sentence, _) = after.split_once('`').unwrap();
    assert!(read("tests/errors.rs").contains(sentence), "{sentence}");
}

/// Steps are called as they are in the code, in their order.
#[test]
fn the_steps_are_those_of_a_plan() {
    let plan = read("src/convert/plan.rs");
    let (_, steps) = plan.split_once("Attribute::Private => &[").unwrap();
    let (before, rest) = steps.split_once(']').unwrap();
    let (_, steps) = rest.split_once("Attribute::Private => &[").unwrap();
    let (after, _) = steps.split_once(']').unwrap();
    let all = format!("{before},{after}");
    let steps: Vec<_> = all
        .split(',')
        .map(|step| step.trim().trim_start_matches("Step::"))
        .collect();
    let design = design();
    let told = design.lines().filter_map(|line| {
        let (number, rest) = line.trim_start().split_once(' ')?;
        number.parse::<u32>().ok()?;
        line.starts_with("   ")
            .then(|| rest.split_whitespace().next())?
    });
    assert_eq!(told.collect::<Vec<_>>(), steps);
}
