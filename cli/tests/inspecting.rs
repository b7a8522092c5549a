//! `backtide inspect` prints the golden files of a store: one of each kind.

mod support;

use std::path::{Path, PathBuf};

use support::Bench;

/// The files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn every_kind_of_file_of_a_store_is_printed() {
    let (bench, golden) = (Bench::new(), Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/v1"));
    let mut found: Vec<PathBuf> =
        ["store", "segment", "images", "overlay"].iter().flat_map(|part| files(&golden.join(part))).collect();
    // What the base of a log says, for the test of the pack beside it.
    found.retain(|path| !path.ends_with("images/roots"));
    assert!(found.len() > 20, "{found:?}");
    for path in found {
        let name = path.to_str().unwrap();
        let said = bench.run(&["inspect", name]);
        assert_eq!((said.code, said.stderr.as_str()), (0, ""), "{name}: {said:?}");
        assert!(said.stdout.lines().count() > 1, "{name}: {said:?}");
    }
}
