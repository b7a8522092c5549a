//! Reads the workspace as text, for the rules that no compiler knows.
//!
//! The rules themselves are the tests of this crate.

use std::path::{Path, PathBuf};

/// Folders that are not source.
const NOT_SOURCE: [&str; 4] = ["target", ".git", "node_modules", "testdata"];

/// The root of the workspace.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("this crate is two folders below the root").to_owned()
}

/// Every file of the workspace whose name ends so, with its path from the root and its text.
pub fn files(ending: &str) -> Vec<(String, String)> {
    let (root, mut found) = (root(), Vec::new());
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("read a folder of the workspace") {
            let entry = entry.expect("read an entry of a folder");
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            if entry.file_type().expect("the type of an entry").is_dir() {
                if !NOT_SOURCE.contains(&name.as_str()) {
                    folders.push(path);
                }
            } else if name.ends_with(ending) {
                let text = std::fs::read_to_string(&path).expect("source is text");
                let from_root = path.strip_prefix(&root).expect("below the root");
                found.push((from_root.to_string_lossy().into_owned(), text));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no {ending} below {}", root.display());
    found
}

/// The manifest of each crate, by the crate's name, and that of the workspace by "".
pub fn manifests() -> Vec<(String, toml::Table)> {
    let parse = |(path, text): (String, String)| {
        let table: toml::Table = text.parse().unwrap_or_else(|error| panic!("{path}: {error}"));
        let name = table.get("package").and_then(|package| package.get("name")).and_then(toml::Value::as_str);
        (name.unwrap_or_default().to_owned(), table)
    };
    files("Cargo.toml").into_iter().map(parse).collect()
}

/// The names of a manifest's dependencies, of the given kinds such as `dev-dependencies`.
pub fn dependencies<'table>(manifest: &'table toml::Table, kinds: &[&str]) -> Vec<&'table str> {
    let tables = kinds.iter().filter_map(|kind| manifest.get(*kind).and_then(toml::Value::as_table));
    tables.flat_map(toml::Table::keys).map(String::as_str).collect()
}
