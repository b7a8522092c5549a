//! What a pass says of its end is compared with when it ended, under load.

use backtide_sim::{PassSeen, Steady};

const STEADY: Steady =
    Steady { bandwidth: 2_000_000, think_us: 20_000, resync_rate: 0, bandwidth_later: 2_000_000 };

/// What was said from `from` on, as parts of how long it really took from then on.
fn said_after(pass: &PassSeen, from: u64) -> Vec<f64> {
    // In the last moments a fixed wait for the receiver is most of what is left.
    let until = pass.took - pass.took / 10;
    let said = pass.said.iter().filter(|said| said.at >= from && said.at < until);
    said.map(|said| said.ends_in.map_or(f64::NAN, |ends| ends as f64 / (pass.took - said.at) as f64))
        .collect()
}

fn assert_within(parts: &[f64], least: f64, most: f64, what: &str) {
    assert!(parts.len() > 10, "{what}: {} moments", parts.len());
    let wrong: Vec<&f64> = parts.iter().filter(|part| !(least..most).contains(*part)).collect();
    assert!(wrong.is_empty(), "{what}: {wrong:?} of {parts:?}");
}

#[test]
fn the_end_of_a_pass_under_load_is_what_was_said() {
    for seed in 0..5 {
        let pass = STEADY.pass(seed);
        assert_within(&said_after(&pass, pass.took / 10), 0.75, 1.33, &format!("seed {seed}"));
        // A write of at most 8 KiB each 10 ms, half as large on an average.
        assert!((100_000..1_600_000).contains(&pass.guest), "seed {seed}: {} bytes a second", pass.guest);
    }
}

#[test]
fn a_pass_that_is_held_to_a_rate_ends_when_it_says() {
    for seed in 0..3 {
        let pass = Steady { resync_rate: 1_000_000, ..STEADY }.pass(seed);
        assert!(pass.took > 6_000_000, "seed {seed}: 8 MB at a megabyte a second took {} us", pass.took);
        assert_within(&said_after(&pass, pass.took / 10), 0.7, 1.3, &format!("seed {seed}"));
    }
}

#[test]
fn a_link_that_becomes_slower_is_believed_within_seconds() {
    for seed in 0..3 {
        let pass = Steady { bandwidth_later: 600_000, ..STEADY }.pass(seed);
        let believed = pass.took / 2;
        assert_within(&said_after(&pass, believed), 0.6, 1.4, &format!("seed {seed}"));
    }
}
