//! Every target, a fixed number of seeds each; `BACKTIDE_FUZZ_SECONDS=60` goes on for so long, `SEED=N` runs one seed.

use backtide_fuzz::targets;

macro_rules! targets {
    ($($function:ident: $name:literal,)*) => {
        $(
            #[test]
            fn $function() {
                targets::named($name).run();
            }
        )*

        #[test]
        fn every_target_has_a_test() {
            let names: Vec<&str> = targets::all().iter().map(|target| target.name).collect();
            assert_eq!(names, [$($name),*]);
        }
    };
}

targets! {
    batch: "batch",
    segment: "segment",
    log: "log",
    base: "base",
    pack: "pack",
    image_root: "image root",
    overlay_map: "overlay map",
    tracking_file: "tracking file",
    spill_file: "spill file",
    hydration_file: "hydration file",
    stream: "stream",
    nbd_server: "nbd server",
    nbd_client: "nbd client",
    nbd_uri: "nbd uri",
}

#[test]
fn a_seed_stands_for_the_same_bytes_every_time_and_changes_something() {
    for target in targets::all() {
        let changed = (0..100).filter(|seed| {
            let bytes = target.bytes(*seed);
            assert_eq!(bytes, target.bytes(*seed), "{} {seed}", target.name);
            !target.samples.contains(&bytes)
        });
        assert!(changed.count() > 80, "{}", target.name);
    }
}
