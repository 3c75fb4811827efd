//! The graph of the crate's modules, read from its sources.
//!
//! Every `use` is an edge, and so is every path that starts with `crate`, `self`, `super` or a child module.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::text::{behind, blanked, tokens, without_tests, Token};

/// The text of every file, by its path under a folder: `ops/linear.rs` under `src`.
pub type Files = BTreeMap<String, String>;

/// The sources of this crate.
pub fn sources() -> Files {
    sources_of("src")
}

/// The sources in a folder of the repository.
pub fn sources_of(folder: &str) -> Files {
    let mut files = Files::new();
    read(&root().join(folder), "", &mut files);
    files
}

/// The folder of `Cargo.toml`.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(dir: &Path, prefix: &str, files: &mut Files) {
    for entry in std::fs::read_dir(dir).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        let name = format!("{prefix}{}", path.file_name().expect("a name").to_string_lossy());
        if path.ends_with("target") {
            continue; // what cargo builds of the package examples/serve
        }
        if path.is_dir() {
            read(&path, &format!("{name}/"), files);
        } else if name.ends_with(".rs") {
            files.insert(name, std::fs::read_to_string(&path).expect("a text"));
        }
    }
}

/// A path from one module to something of the crate.
#[derive(Debug, Clone)]
pub struct Edge {
    /// From the crate's root, such as `["ops", "linear"]`.
    pub path: Vec<String>,
    /// The name under which it is imported: `None` for a path in an expression, `*` for a glob import.
    name: Option<String>,
    /// Whether it is a `pub use` of any visibility.
    pub reexport: bool,
    pub line: usize,
}

/// One module of the crate that is not a test.
#[derive(Debug)]
pub struct Module {
    pub file: String,
    children: BTreeSet<String>,
    defined: BTreeSet<String>,
    pub edges: Vec<Edge>,
}

/// All modules that are reached from `lib.rs`, by their path.
#[derive(Debug, Default)]
pub struct Crate {
    pub modules: BTreeMap<Vec<String>, Module>,
}

impl Crate {
    pub fn new(files: &Files) -> Self {
        let mut all = Self::default();
        all.add(files, Vec::new(), "lib.rs");
        all
    }

    fn add(&mut self, files: &Files, path: Vec<String>, file: &str) {
        let blank = blanked(&files[file]);
        let tokens = without_tests(&tokens(&blank));
        let children: BTreeSet<String> = tokens
            .windows(3)
            .filter(|of| of[0].text == "mod" && of[2].text == ";")
            .map(|of| of[1].text.to_string())
            .collect();
        for child in &children {
            let below: Vec<String> = path.iter().chain([child]).cloned().collect();
            let stem = below.join("/");
            let found = [format!("{stem}.rs"), format!("{stem}/mod.rs")]
                .into_iter()
                .find(|at| files.contains_key(at));
            self.add(files, below, &found.unwrap_or_else(|| panic!("{file} declares {child}: no such file")));
        }
        let defined = definitions(&tokens);
        let edges = edges(&path, &children, &tokens);
        self.modules.insert(path, Module { file: file.to_string(), children, defined, edges });
    }

    /// The module that defines the item of a path, found through re-exports and imports.
    pub fn home(&self, path: &[String]) -> Vec<String> {
        self.resolved(path, 0).0
    }

    /// The module, and the rest of the path within it.
    fn resolved(&self, path: &[String], depth: usize) -> (Vec<String>, Vec<String>) {
        let mut at: Vec<String> = Vec::new();
        for (i, name) in path.iter().enumerate() {
            let module = &self.modules[&at];
            if module.children.contains(name) {
                at.push(name.clone());
                continue;
            }
            let left = || (at.clone(), path[i..].to_vec());
            if depth > 16 || module.defined.contains(name) {
                return left();
            }
            let named = module.edges.iter().find(|edge| edge.name.as_ref() == Some(name));
            if let Some(edge) = named {
                let whole: Vec<String> = edge.path.iter().chain(&path[i + 1..]).cloned().collect();
                return self.resolved(&whole, depth + 1);
            }
            for glob in module.edges.iter().filter(|edge| edge.name.as_deref() == Some("*")) {
                let (from, rest) = self.resolved(&glob.path, depth + 1);
                if rest.is_empty() && from != at && self.modules[&from].offers(name) {
                    let whole: Vec<String> = from.iter().chain(&path[i..]).cloned().collect();
                    return self.resolved(&whole, depth + 1);
                }
            }
            return left();
        }
        (at, Vec::new())
    }
}

impl Module {
    fn offers(&self, name: &str) -> bool {
        let imported = self.edges.iter().any(|edge| edge.name.as_deref() == Some(name));
        imported || self.defined.contains(name) || self.children.contains(name)
    }

    /// The names that the file defines: functions, types, constants, macros and inline modules.
    pub fn definitions(&self) -> &BTreeSet<String> {
        &self.defined
    }
}

/// The names that a file defines outside of braces.
fn definitions(tokens: &[Token]) -> BTreeSet<String> {
    let words = ["fn", "struct", "enum", "union", "trait", "type", "const", "static", "mod"];
    let (mut found, mut i) = (BTreeSet::new(), 0);
    while i < tokens.len() {
        let text = |at: usize| tokens.get(at).map_or("", |token| token.text);
        let name = match text(i) {
            "{" => {
                i = behind(tokens, i);
                continue;
            }
            "macro_rules" => text(i + 2),
            "static" if text(i + 1) == "mut" => text(i + 2),
            "mod" if text(i + 2) == ";" => "",
            word if words.contains(&word) => text(i + 1),
            _ => "",
        };
        if name.starts_with(|c: char| c.is_alphabetic() || c == '_') && !words.contains(&name) {
            found.insert(name.to_string());
        }
        i += 1;
    }
    found
}

fn edges(module: &[String], children: &BTreeSet<String>, tokens: &[Token]) -> Vec<Edge> {
    let (mut found, mut i) = (Vec::new(), 0);
    let text = |at: usize| tokens.get(at).map_or("", |token| token.text);
    while i < tokens.len() {
        let before = if i == 0 { ";" } else { text(i - 1) };
        if text(i) == "mod" && text(i + 2) == "{" {
            // An inline module: no path resolves through its imports, so they get no names.
            let (inner, end) = ([module, &[text(i + 1).to_string()]].concat(), behind(tokens, i + 2));
            let within = edges(&inner, &BTreeSet::new(), &tokens[i + 3..end - 1]);
            found.extend(within.into_iter().map(|edge| Edge { name: None, ..edge }));
            i = end;
            continue;
        }
        if text(i) == "use" && [";", "{", "}", "]", ")", "pub"].contains(&before) {
            let mut leaves = Vec::new();
            let reexport = before == "pub" || before == ")";
            let line = tokens[i].line;
            i = tree(tokens, i + 1, &mut Vec::new(), &mut leaves);
            for (path, name) in leaves {
                if let Some(path) = absolute(module, children, &path) {
                    found.push(Edge { path, name: Some(name), reexport, line });
                }
            }
            continue;
        }
        let starts = ["crate", "self", "super"].contains(&text(i)) || children.contains(text(i));
        if starts && text(i + 1) == "::" && !["::", ".", "in"].contains(&before) {
            let (mut path, line) = (vec![text(i).to_string()], tokens[i].line);
            while text(i + 1) == "::" && text(i + 2).starts_with(|c: char| c.is_alphabetic() || c == '_') {
                path.push(text(i + 2).to_string());
                i += 2;
            }
            if let Some(path) = absolute(module, children, &path) {
                found.push(Edge { path, name: None, reexport: false, line });
            }
        }
        i += 1;
    }
    found
}

/// Collects the leaves of a tree of `use`, each with the name it is imported under; returns the index after
/// the tree.
fn tree(
    tokens: &[Token],
    mut i: usize,
    prefix: &mut Vec<String>,
    leaves: &mut Vec<(Vec<String>, String)>,
) -> usize {
    let depth = prefix.len();
    while let Some(token) = tokens.get(i) {
        match token.text {
            "::" => i += 1,
            "{" => {
                i += 1;
                while tokens.get(i).is_some_and(|token| token.text != "}") {
                    i = tree(tokens, i, prefix, leaves);
                    i += usize::from(tokens.get(i).is_some_and(|token| token.text == ","));
                }
                prefix.truncate(depth);
                return i + 1;
            }
            "*" => {
                leaves.push((prefix.clone(), "*".to_string()));
                prefix.truncate(depth);
                return i + 1;
            }
            "as" => {
                leaves.push((prefix.clone(), tokens[i + 1].text.to_string()));
                prefix.truncate(depth);
                return i + 2;
            }
            "," | "}" | ";" => break,
            // `ops::{self, linear}`
            "self" if !prefix.is_empty() => i += 1,
            word => {
                prefix.push(word.to_string());
                i += 1;
            }
        }
    }
    if let Some(name) = prefix.last().cloned() {
        leaves.push((prefix.clone(), name));
    }
    prefix.truncate(depth);
    i
}

/// Resolves a path to one from the crate's root; `None` for a path of another crate.
fn absolute(module: &[String], children: &BTreeSet<String>, path: &[String]) -> Option<Vec<String>> {
    let (first, rest) = path.split_first()?;
    let mut base = match first.as_str() {
        "crate" => Vec::new(),
        "self" => module.to_vec(),
        "super" => module[..module.len().saturating_sub(1)].to_vec(),
        child if children.contains(child) => module.iter().chain([first]).cloned().collect(),
        _ => return None,
    };
    let mut rest = rest.iter().peekable();
    while rest.next_if(|name| name.as_str() == "super").is_some() {
        base.pop();
    }
    base.extend(rest.cloned());
    Some(base)
}
