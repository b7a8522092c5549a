//! The rules of the source.

use backtide_tidy::{dependencies, files, manifests, root};

/// Crates that know no daemon, no socket, no clock of a runtime.
const LEAVES: [&str; 13] = [
    "backtide-units",
    "backtide-storage",
    "backtide-nbd",
    "backtide-tracking",
    "backtide-spill",
    "backtide-hydration",
    "backtide-io-filter",
    "backtide-protocol",
    "backtide-segment",
    "backtide-images",
    "backtide-recovery",
    "backtide-overlay",
    "backtide-filesystems",
];

/// What a leaf must not be able to reach.
const OUTSIDE: [&str; 8] =
    ["tokio", "axum", "hyper", "hyper-util", "reqwest", "tracing-subscriber", "clap", "toml"];

/// The longest file, in lines: a file that needs a map is split.
const LINES_MAX: usize = 500;

fn assert_none(wrong: &[String], rule: &str) {
    assert!(wrong.is_empty(), "{rule}:\n  {}", wrong.join("\n  "));
}

#[test]
fn every_file_says_first_what_it_is_for() {
    let bare = |(path, text): (String, String)| (!text.starts_with("//! ")).then_some(path);
    // A `tests.rs` is the tests of the file it belongs to, which says it.
    let own = |path: &String| !path.ends_with("/tests.rs");
    let wrong: Vec<String> = files(".rs").into_iter().filter_map(bare).filter(own).collect();
    assert_none(&wrong, "a file begins with `//! ` and its job");
}

#[test]
fn no_file_needs_a_map() {
    let long = |(path, text): (String, String)| {
        let lines = text.lines().count();
        (lines > LINES_MAX).then(|| format!("{path} has {lines} lines"))
    };
    let wrong: Vec<String> = files(".rs").into_iter().filter_map(long).collect();
    assert_none(&wrong, &format!("a file has at most {LINES_MAX} lines"));
}

#[test]
fn leaves_depend_on_no_runtime_and_on_no_daemon() {
    let manifests = manifests();
    let mut wrong = Vec::new();
    for leaf in LEAVES {
        let (_, manifest) = manifests
            .iter()
            .find(|(name, _)| name == leaf)
            .unwrap_or_else(|| panic!("there is no crate {leaf}: correct this list"));
        for used in dependencies(manifest, &["dependencies", "build-dependencies"]) {
            let ours_and_no_leaf = used.starts_with("backtide-") && !LEAVES.contains(&used);
            if OUTSIDE.contains(&used) || ours_and_no_leaf {
                wrong.push(format!("{leaf} depends on {used}"));
            }
        }
    }
    assert_none(&wrong, "leaf crates stand on leaf crates and on nothing that does I/O by itself");
}

#[test]
fn only_storage_may_be_unsafe() {
    let allows = |(path, text): (String, String)| {
        let allows = text.contains("allow(unsafe_code") || text.contains("expect(unsafe_code");
        (allows && !path.starts_with("io-filter/storage/")).then_some(path)
    };
    // The needles above are text of this file.
    let own = |path: &String| !path.starts_with("tests/tidy/");
    let wrong: Vec<String> = files(".rs").into_iter().filter_map(allows).filter(own).collect();
    assert_none(&wrong, "unsafe code is in io-filter/storage or nowhere");
}

#[test]
fn every_shared_dependency_is_used_and_every_crate_shares() {
    let manifests = manifests();
    let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
    let (_, workspace) = manifests.iter().find(|(name, _)| name.is_empty()).expect("a workspace");
    let shared = workspace["workspace"].as_table().expect("a table of the workspace");
    let shared = dependencies(shared, &["dependencies"]);
    let used: Vec<&str> = manifests.iter().flat_map(|(_, manifest)| dependencies(manifest, &kinds)).collect();
    let unused: Vec<String> =
        shared.iter().filter(|name| !used.contains(name)).map(|name| (*name).to_owned()).collect();
    assert_none(&unused, "a dependency of the workspace is used by some crate");

    let mut own = Vec::new();
    for (name, manifest) in &manifests {
        for kind in kinds {
            let table = manifest.get(kind).and_then(toml::Value::as_table);
            for (dependency, how) in table.into_iter().flatten() {
                if how.get("workspace").and_then(toml::Value::as_bool) != Some(true) {
                    own.push(format!("{name}: {dependency}"));
                }
            }
        }
    }
    assert_none(&own, "versions are in the manifest of the workspace only");
}

#[test]
fn every_crate_takes_the_lints_of_the_workspace() {
    let lax = |(name, manifest): &(String, toml::Table)| {
        let lints = manifest.get("lints").and_then(|lints| lints.get("workspace"));
        let taken = lints.and_then(toml::Value::as_bool) == Some(true);
        (!name.is_empty() && !taken).then(|| name.clone())
    };
    let wrong: Vec<String> = manifests().iter().filter_map(lax).collect();
    assert_none(&wrong, "a crate has [lints] workspace = true");
}

#[test]
fn no_test_is_ignored_and_no_work_left_as_a_comment() {
    let mut wrong = Vec::new();
    for (path, text) in files(".rs") {
        // The needles are text of this file.
        if path.starts_with("tests/tidy/") {
            continue;
        }
        for (number, line) in (1..).zip(text.lines()) {
            if line.trim_start().starts_with("#[ignore") || line.contains("TODO") || line.contains("FIXME") {
                wrong.push(format!("{path}:{number}: {}", line.trim()));
            }
        }
    }
    assert_none(&wrong, "no test is ignored and no work is left as a comment");
}

#[test]
fn every_file_that_the_architecture_names_is_there() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("read ARCHITECTURE.md");
    // What stands between backticks is every second part.
    let named = text.split('`').skip(1).step_by(2).filter(|name| name.ends_with(".rs"));
    let named: Vec<&str> = named.collect();
    assert!(named.len() > 50, "{} files are named", named.len());
    let missing = named.into_iter().filter(|name| !root().join(name).is_file());
    let wrong: Vec<String> = missing.map(str::to_owned).collect();
    assert_none(&wrong, "a file is named with its path from the root");
}
