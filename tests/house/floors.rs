//! Checks the layers ("floors") of `docs/ARCHITECTURE.md`: a module imports only from lower floors, or from
//! modules to its left on its own floor; the files of one folder have no cyclic imports; `lib.rs` and every
//! `mod.rs` define nothing.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{root, sources, Crate, Edge, Files, Module};
use crate::text::{blanked, tokens, without_tests};

/// The floor of every module and its position on the floor.
type Floors = BTreeMap<String, (usize, usize)>;

#[test]
fn every_arrow_points_down_and_no_folder_has_a_circle() {
    let document = std::fs::read_to_string(root().join("docs/ARCHITECTURE.md")).expect("the document");
    let found = violations(&floors(&document), &sources());
    assert!(found.is_empty(), "{} violations:\n{}", found.len(), found.join("\n"));
}

/// Parses the fenced block ```` ```floors ````: a line for each floor, `number: module, module`.
fn floors(document: &str) -> Floors {
    let block = document.split("```floors\n").nth(1).and_then(|rest| rest.split("```").next());
    let mut floors = Floors::new();
    for line in block.expect("a block of floors").lines() {
        let (number, modules) = line.split_once(':').expect("number: modules");
        let floor = number.trim().parse().expect("the number of a floor");
        for (place, module) in modules.split(',').enumerate() {
            let before = floors.insert(module.trim().to_string(), (floor, place));
            assert!(before.is_none(), "{module} stands on two floors");
        }
    }
    floors
}

/// All violations of the rules, a line each.
fn violations(floors: &Floors, files: &Files) -> Vec<String> {
    let all = Crate::new(files);
    let mut found = Vec::new();
    let lib = &all.modules[&Vec::new()];
    found.extend(lib.definitions().iter().map(|name| format!("lib.rs defines {name}")));
    let blank = blanked(&files["lib.rs"]);
    let braces = without_tests(&tokens(&blank)).into_iter().filter(|token| token.text == "impl");
    found.extend(braces.map(|token| format!("lib.rs:{} has an impl", token.line)));
    let modules: BTreeSet<&String> = all.modules.keys().filter_map(|path| path.first()).collect();
    found.extend(modules.iter().filter(|m| !floors.contains_key(**m)).map(|m| format!("{m} is on no floor")));
    found.extend(
        floors.keys().filter(|m| !modules.contains(m)).map(|m| format!("{m} of the floors is no module")),
    );

    let mut folders: BTreeMap<Vec<String>, Arrows> = BTreeMap::new();
    for (path, module) in all.modules.iter().filter(|(path, _)| !path.is_empty()) {
        if module.file.ends_with("/mod.rs") {
            found.extend(module.definitions().iter().map(|name| format!("{} defines {name}", module.file)));
        }
        for edge in &module.edges {
            let home = all.home(&edge.path);
            let shared = path.iter().zip(&home).take_while(|(a, b)| a == b).count();
            if shared == 0 {
                found.extend(climbs(floors, path, module, edge, &home));
            } else if *path != home && !(edge.reexport && home.starts_with(path)) {
                let node = |at: &[String]| at.get(shared).cloned().unwrap_or_else(|| OWN.to_string());
                let arrows = folders.entry(path[..shared].to_vec()).or_default();
                let why = format!("{}:{} {}", module.file, edge.line, edge.path.join("::"));
                arrows.entry((node(path), node(&home))).or_insert(why);
            }
        }
    }
    for (folder, arrows) in &folders {
        for circle in circles(arrows) {
            let names: Vec<&str> = circle.iter().map(|name| name.as_str()).collect();
            let within = |(from, to): &(String, String)| circle.contains(from) && circle.contains(to);
            let why = arrows.iter().filter(|(arrow, _)| within(arrow));
            let why: Vec<String> =
                why.map(|((from, to), why)| format!("    {from} -> {to}: {why}")).collect();
            let folder = folder.join("/");
            found.push(format!("a circle in {folder}: {}\n{}", names.join(", "), why.join("\n")));
        }
    }
    found
}

/// The name of a folder's own file, `mod.rs` or the file beside the folder, among its children.
const OWN: &str = "itself";

/// The imports among the children of a folder as (from, to), each with one place where it occurs.
type Arrows = BTreeMap<(String, String), String>;

/// The violation of an import between two top-level modules, if it is one.
fn climbs(floors: &Floors, from: &[String], module: &Module, edge: &Edge, home: &[String]) -> Option<String> {
    let at = format!("{}:{} {}", module.file, edge.line, edge.path.join("::"));
    let Some(to) = home.first() else { return Some(format!("{at}: lib.rs defines nothing to import")) };
    let ((own, own_place), (other, other_place)) = (floors.get(&from[0])?, floors.get(to)?);
    if other > own {
        return Some(format!("{at}: {} on floor {own} climbs to {to} on floor {other}", from[0]));
    }
    let later = other == own && other_place > own_place;
    later.then(|| format!("{at}: {} imports {to}, which stands after it on floor {own}", from[0]))
}

/// The sets of nodes that reach each other: the cycles.
fn circles(arrows: &Arrows) -> Vec<BTreeSet<String>> {
    let nodes: BTreeSet<&String> = arrows.keys().flat_map(|(from, to)| [from, to]).collect();
    let reached = |start: &String| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![start.clone()]);
        while let Some(node) = open.pop() {
            let next = arrows.keys().filter(|(from, _)| *from == node).map(|(_, to)| to.clone());
            open.extend(next.filter(|to| seen.insert(to.clone())).collect::<Vec<_>>());
        }
        seen
    };
    let reach: BTreeMap<&String, BTreeSet<String>> =
        nodes.iter().map(|node| (*node, reached(node))).collect();
    let together = nodes.iter().filter(|node| reach[**node].contains(**node)).map(|node| {
        let back = reach[*node].iter().filter(|other| reach[other].contains(*node));
        back.cloned().collect::<BTreeSet<String>>()
    });
    together.collect::<BTreeSet<_>>().into_iter().collect()
}

/// The violations in a crate of these files with the floors `0: error, ops` and `1: layer, model`.
fn of(files: &[(&str, &str)]) -> Vec<String> {
    let floors = floors("```floors\n0: error, ops\n1: layer, model\n```");
    let lib = (
        "lib.rs",
        "mod error;\nmod ops;\npub mod layer;\npub mod model;\npub use error::{Error, Result as R};",
    );
    let rest = [
        ("error.rs", "pub struct Error; pub type Result = u8;"),
        ("ops.rs", ""),
        ("layer.rs", ""),
        ("model.rs", ""),
    ];
    let mut all = Files::new();
    for (file, text) in rest.iter().chain([&lib]).chain(files) {
        all.insert(file.to_string(), text.to_string());
    }
    violations(&floors, &all)
}

#[test]
fn what_points_down_is_allowed() {
    let model =
        "use crate::{layer::Layer, ops::{self, linear}, Error}; fn f() -> crate::R { crate::ops::g() }";
    let layer =
        "//! See [`crate::model`].\nuse super::error;\n#[cfg(test)]\nmod tests { use crate::model::M; }\n\
                 #[cfg(all(test, unix))]\nuse crate::model::N;\nconst TEXT: &str = \"crate::model\";";
    assert_eq!(of(&[("model.rs", model), ("layer.rs", layer)]), Vec::<String>::new());
}

#[test]
fn what_climbs_or_points_to_the_right_is_found_wherever_it_stands() {
    let found = of(&[
        ("error.rs", "pub struct Error; pub type Result = u8; fn f() { let x = crate::ops::linear(1); }"),
        ("ops.rs", "use crate::{Error, layer::Layer as L};"),
        ("layer.rs", "#[cfg(any(test, feature = \"x\"))]\nuse super::model::M;"),
    ]);
    assert_eq!(
        found,
        [
            "error.rs:1 ops::linear: error imports ops, which stands after it on floor 0",
            "layer.rs:2 model::M: layer imports model, which stands after it on floor 1",
            "ops.rs:1 layer::Layer: ops on floor 0 climbs to layer on floor 1",
        ]
    );
}

#[test]
fn a_circle_of_files_is_found_through_re_exports_but_a_folder_that_only_re_exports_is_none() {
    let ops = "mod a; mod b; mod c; pub use a::A; pub(crate) use b::{B, b}; pub use c::*;";
    let fine = [
        ("ops.rs", ops),
        ("ops/a.rs", "pub struct A;"),
        ("ops/b.rs", "use super::A; pub struct B;"),
        ("ops/c.rs", "use super::{A, B}; pub fn c() {}"),
    ];
    assert_eq!(of(&fine), Vec::<String>::new());
    let mut circle = fine;
    circle[1].1 = "pub struct A; fn f() { super::c() }";
    let found = of(&circle);
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with("a circle in ops: a, b, c\n    a -> c: ops/a.rs:1 ops::c\n"),
        "{}",
        found[0]
    );
    // A folder's own file can be part of a cycle if it defines items itself and uses its children.
    let own = "mod a; pub fn made() { a::A; } pub struct Shared;";
    let found = of(&[("ops.rs", own), ("ops/a.rs", "use super::Shared; pub struct A;")]);
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("a circle in ops: a, itself\n"), "{}", found[0]);
}

#[test]
fn the_root_defines_nothing_and_every_module_has_its_floor() {
    let lib = "mod error; mod ops; mod layer; mod extra; pub fn helper() {}";
    let found = of(&[("lib.rs", lib), ("extra.rs", "use crate::helper;")]);
    let want = ["lib.rs defines helper", "extra is on no floor", "model of the floors is no module"];
    assert_eq!(found[..3], want);
    assert_eq!(found[3], "extra.rs:1 helper: lib.rs defines nothing to import");
}

#[test]
fn a_mod_rs_defines_nothing_but_the_file_beside_a_folder_may() {
    let own = "mod a; pub struct Shared; #[cfg(test)] mod tests { fn f() {} }";
    let rest = [("ops.rs", "mod inner;"), ("ops/inner/a.rs", "pub struct A;")];
    let with = |file| of(&[rest[0], rest[1], (file, own)]);
    assert_eq!(with("ops/inner.rs"), Vec::<String>::new());
    assert_eq!(with("ops/inner/mod.rs"), ["ops/inner/mod.rs defines Shared"]);
}
