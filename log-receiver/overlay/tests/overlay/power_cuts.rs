//! What was flushed is there after a power cut, and of what came later a prefix, wherever it happens.

use crate::common::*;
use backtide_overlay::{Existing, Overlay};
use backtide_storage::MemoryStorage;

/// Every image that the overlay may hold after a crash, oldest first.
struct Possible {
    images: Vec<Vec<u8>>,
}

impl Possible {
    /// Runs steps until one fails, or `count` of them.
    fn run(&mut self, overlay: &Overlay, steps: &mut Steps, count: usize) {
        for _ in 0..count {
            let step = steps.next_step();
            let mut image = self.images.last().unwrap().clone();
            step.run_on(&mut image);
            // It may have happened or not when it failed.
            self.images.push(image);
            match step.run(overlay) {
                Ok(()) if matches!(step, Step::Flush) => drop(self.images.drain(..self.images.len() - 1)),
                Ok(()) => {}
                Err(_) => return,
            }
        }
    }

    /// One of them is what is there now.
    fn settle(&mut self, found: Vec<u8>, story: &str) {
        let known = self.images.contains(&found);
        assert!(known, "{story}: none of {} possible images", self.images.len());
        self.images = vec![found];
    }
}

fn story(seed: u64, cut: u64) -> bool {
    let (storage, mut overlay) = fresh();
    let mut steps = Steps(seed);
    let mut possible = Possible { images: vec![below()] };
    storage.cut_power_after(cut);
    possible.run(&overlay, &mut steps, 40);
    let was_off = storage.is_off();
    for round in 0..3 {
        drop(overlay);
        storage.crash(seed ^ cut << 8 ^ round);
        let story = format!("SEED={seed} cut {cut} round {round}");
        overlay = open(&storage, Existing::Open).unwrap_or_else(|error| panic!("{story}: {error}"));
        possible.settle(content(&overlay).unwrap(), &story);
        possible.run(&overlay, &mut steps, 10);
    }
    was_off
}

#[test]
fn whatever_a_power_cut_leaves_is_a_prefix_with_everything_flushed() {
    let seeds = std::env::var("BACKTIDE_OVERLAY_SEEDS").map_or(6, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        let ended = (0..).find(|cut| !story(seed, *cut)).unwrap();
        assert!(ended > 40, "the story has {ended} places to cut");
    }
}

#[test]
fn a_power_cut_while_it_is_made_leaves_none_or_an_empty_one() {
    for cut in 0.. {
        let storage = MemoryStorage::new();
        backtide_storage::Storage::create_dir(&storage, std::path::Path::new("overlays")).unwrap();
        storage.cut_power_after(cut);
        let made = open(&storage, Existing::Create).is_ok();
        storage.crash(cut);
        match open(&storage, Existing::Open) {
            Ok(overlay) => assert_eq!(content(&overlay).unwrap(), below(), "cut {cut}"),
            Err(error) => assert!(!made, "cut {cut}: {error}"),
        }
        backtide_overlay::remove(&storage, &files()).unwrap();
        assert!(storage.files().is_empty(), "cut {cut}");
        if made {
            return assert!(cut > 5);
        }
    }
}

#[test]
fn a_killed_process_loses_no_write_that_was_answered() {
    for seed in 0..20 {
        let (storage, mut overlay) = fresh();
        let (mut steps, mut image) = (Steps(seed), below());
        for _ in 0..10 {
            for _ in 0..7 {
                let step = steps.next_step();
                step.run(&overlay).unwrap();
                step.run_on(&mut image);
            }
            drop(overlay);
            storage.kill_handles();
            overlay = open(&storage, Existing::Open).unwrap();
            assert_eq!(content(&overlay).unwrap(), image, "SEED={seed}");
        }
    }
}

#[test]
fn after_a_failed_sync_nothing_is_promised_until_it_is_opened_again() {
    for seed in 0..6 {
        for sync in 0..12 {
            let (storage, overlay) = fresh();
            let mut steps = Steps(seed);
            let mut possible = Possible { images: vec![below()] };
            storage.fail_sync_after(sync);
            possible.run(&overlay, &mut steps, 200);
            if overlay.flush().is_ok() {
                // It was the sync of a new map, which is not needed.
                continue;
            }
            let refused = overlay.write(backtide_units::ByteOffset(0), &[1; 4096], &Below);
            assert!(matches!(refused, Err(backtide_overlay::OverlayError::Poisoned(_))), "{refused:?}");
            assert!(overlay.flush().is_err());
            drop(overlay);
            let overlay = open(&storage, Existing::Open).unwrap();
            possible.settle(content(&overlay).unwrap(), "opened again");
            // What is there now was made durable by opening it.
            drop(overlay);
            storage.crash(seed);
            let overlay = open(&storage, Existing::Open).unwrap();
            let found = content(&overlay).unwrap_or_else(|error| panic!("SEED={seed} sync {sync}: {error}"));
            possible.settle(found, "after the power cut");
        }
    }
}

#[test]
fn a_failed_write_changes_nothing_and_the_next_one_goes_on() {
    for write in 0..30 {
        let (storage, mut overlay) = fresh();
        let (mut steps, mut image) = (Steps(write), below());
        storage.fail_write_after(write);
        let mut failed = 0;
        for _ in 0..60 {
            let step = steps.next_step();
            match step.run(&overlay) {
                Ok(()) => step.run_on(&mut image),
                Err(_) => failed += 1,
            }
            if matches!(step, Step::Flush) && failed == 1 {
                // The mark could not be written: until it is opened again, nothing may be.
                drop(overlay);
                overlay = open(&storage, Existing::Open).unwrap();
                failed += 1;
            }
            assert_eq!(content(&overlay).unwrap(), image, "write {write}");
        }
        assert!(failed <= 2);
        overlay.flush().unwrap();
        drop(overlay);
        storage.crash(1);
        assert_eq!(content(&open(&storage, Existing::Open).unwrap()).unwrap(), image, "write {write}");
    }
}
