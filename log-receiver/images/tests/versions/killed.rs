//! A writer that died: what it left reads whole out of memory, and may be durable or not.

use backtide_images::{ImageError, Root};

use crate::common::{Bench, CHUNK, Random, images, read};

/// Seeds of what a power cut leaves.
const SEEDS: u64 = 8;

/// Makes an image that dies with its process at this change; false when there are fewer.
fn dies_at(bench: &mut Bench, change: u64) -> bool {
    bench.storage.cut_power_after(change);
    let died = make(bench).is_err();
    bench.storage.answer_again();
    bench.storage.kill_handles();
    bench.images = images(&bench.storage);
    died
}

/// A disk whose image takes several packs.
fn bench() -> Bench {
    let mut bench = Bench::new(7, 12 * CHUNK);
    let mut random = Random(1);
    bench.content.fill_with(|| random.next() as u8);
    bench
}

fn make(bench: &mut Bench) -> Result<Root, ImageError> {
    bench.make(None, &[true; 12])
}

/// What is made is there after a power cut.
fn assert_durable(bench: &mut Bench, root: Root, seed: u64, said: &str) {
    bench.storage.crash(seed);
    bench.images = images(&bench.storage);
    let found = read(&bench.images.image(root)).unwrap_or_else(|error| panic!("{said}: {error}"));
    assert!(found == bench.content, "{said}: another content");
}

#[test]
fn what_a_writer_left_that_was_killed_is_durable_before_an_image_names_it() {
    for change in 0.. {
        for seed in 0..SEEDS {
            let mut bench = bench();
            let died = dies_at(&mut bench, change);
            if !died {
                assert!(change > 10, "it was killed somewhere: {change}");
                return;
            }
            let root = make(&mut bench).expect("no fault");
            assert_durable(&mut bench, root, seed, &format!("killed at change {change}, seed {seed}"));
        }
    }
}

#[test]
fn a_pack_whose_sync_failed_is_named_by_no_image_from_then_on() {
    let mut refused = 0;
    for change in 0.. {
        let mut bench = bench();
        if !dies_at(&mut bench, change) {
            break;
        }
        // What the kernel wrote out since has failed, and the next sync of that file alone tells.
        bench.packs().iter().for_each(|pack| bench.storage.fail_write_out(pack));
        let root = make(&mut bench).or_else(|_| {
            refused += 1;
            make(&mut bench)
        });
        let said = format!("killed at change {change}");
        assert_durable(&mut bench, root.expect("it is stored again"), change, &said);
    }
    assert!(refused > 0, "some pack was whole and not durable");
}
