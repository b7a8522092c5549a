//! The README's first command.

mod support;

use support::Bench;

#[test]
fn the_demo_proves_three_points_and_leaves_nothing() {
    let bench = Bench::new();
    let report = bench.json(&["demo"]);
    assert_eq!(report["proved"], true, "{report}");
    let proofs = report["proofs"].as_array().unwrap();
    let names: Vec<&str> = proofs.iter().map(|proof| proof["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["before the cut", "the resync point", "latest"]);
    let lsns: Vec<u64> = proofs.iter().map(|proof| proof["lsn"].as_u64().unwrap()).collect();
    assert!(lsns.is_sorted() && lsns[0] > 0, "{report}");
    let hole = &report["holes"][0];
    assert_eq!((hole["reason_code"].as_str(), hole["open"].as_bool()), (Some("receiver-away"), Some(false)));
    assert_eq!(hole["before_lsn"].as_u64(), Some(lsns[1]), "the hole ends at the resync point");
    assert_eq!(bench.names(), Vec::<String>::new());
}

#[test]
fn the_demo_tells_its_story_in_few_lines_and_keeps_its_directory_when_asked() {
    let bench = Bench::new();
    let directory = bench.path("kept");
    let said = bench.run(&["demo", "--dir", directory.to_str().unwrap()]);
    assert_eq!(said.code, 0, "{said:?}");
    let lines = said.stdout.lines().count();
    assert!((8..=14).contains(&lines), "{lines} lines:\n{}", said.stdout);
    assert!(directory.join("demo.img").exists() && directory.join("store").is_dir());
    let again = bench.run(&["demo", "--dir", directory.to_str().unwrap()]);
    assert_eq!(again.code, 2, "a used directory is refused: {again:?}");
}
