//! The table of requirements names tests that exist.

use std::path::Path;

#[test]
fn every_test_the_table_names_exists() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = std::fs::read_to_string(here.join("CONFORMANCE.md")).unwrap();
    let mut checked = 0;
    for row in table.lines().filter(|row| row.starts_with("| ") && !row.starts_with("| requirement")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, requirement, tests, _] = cells[..] else { panic!("two cells: {row}") };
        assert!(!tests.is_empty(), "no test for: {requirement}");
        for test in tests.split(", ") {
            let (file, name) = test.split_once("::").unwrap_or_else(|| panic!("file::test: {test}"));
            let path = match file.split_once('/') {
                Some(("export", file)) => here.join("../export/tests").join(file),
                Some(("e2e", file)) => here.join("../../tests/e2e/tests/stories").join(file),
                Some((crate_name, _)) => panic!("unknown crate {crate_name} in {test}"),
                None => here.join("tests").join(file),
            };
            let source = std::fs::read_to_string(path.with_extension("rs"))
                .unwrap_or_else(|error| panic!("{test}: {error}"));
            assert!(source.contains(&format!("fn {name}(")), "there is no test {test}");
            checked += 1;
        }
    }
    assert!(checked > 60, "{checked} tests were found in the table");
}
