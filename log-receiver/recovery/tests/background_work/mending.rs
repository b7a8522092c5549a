//! Damage is mended while the log goes on, and the power fails at every change of that.

use std::path::PathBuf;

use backtide_recovery::{Checked, LogError, Snapshot};
use backtide_storage::Storage;
use backtide_units::{ByteOffset, ByteRange, Lsn};
use bytes::Bytes;

use super::{CHANGES_MAX, settled};
use crate::{
    common::{Random, SayOnPanic, assert_same, indices, seeds, whole},
    world::{Begins, World},
};

/// So many places are damaged at once, of segments and of packs, or one less.
const PLACES: usize = 3;

/// A bit of a file.
type Place = (PathBuf, ByteOffset);

/// Mends what a check finds; the agent is attached, and has what it has.
fn mend(world: &World, disk: &[u8]) -> Result<Checked, LogError> {
    let ask = |range: ByteRange| Some(Bytes::copy_from_slice(&disk[indices(range)]));
    let snapshot = world.agent().log.snapshot()?.alone();
    world.beside_ingest(|| snapshot.check_and_mend(&ask, &mut |_| true))
}

fn damage(world: &World, places: &[Place]) {
    places.iter().for_each(|(path, at)| world.memory.flip_bit(path, *at, 3));
}

/// Places at which damage keeps no log from being opened and is mended, alone and with all others.
fn places(world: &World, disk: &[u8], random: &mut Random) -> Vec<Place> {
    let files = world.memory.files().into_iter().map(|(path, _)| path);
    let (segments, packs): (Vec<_>, Vec<_>) = files
        .filter(|path| path.extension().is_some_and(|name| name == "seg" || name == "pack"))
        .partition(|path| path.extension().is_some_and(|name| name == "seg"));
    let mut chosen = Vec::new();
    // The last segments are written.
    for files in [&segments[..segments.len() - 2], &packs] {
        let enough = chosen.len() + PLACES;
        for _ in 0..100 {
            if chosen.len() == enough {
                break;
            }
            let path = files[random.below(files.len() as u64) as usize].clone();
            let length = world.memory.open(&path).and_then(|file| file.len()).expect("a length").0;
            chosen.push((path, ByteOffset(random.below(length))));
            let tried = world.fork();
            damage(&tried, &chosen);
            let mended = tried.reopened().and_then(|tried| mend(&tried, disk).ok());
            if !mended.is_some_and(|checked| checked.is_sound() && checked.mended.len() == chosen.len()) {
                chosen.pop();
            }
        }
        assert!(chosen.len() + 1 >= enough, "damage that can be mended: {chosen:?}");
    }
    chosen
}

/// Reads what is offered: it is right, or said to be damaged.
fn read_some(world: &World, snapshot: &Snapshot) -> usize {
    let ends =
        snapshot.timeline().intervals().iter().flat_map(|interval| [interval.from.lsn, interval.to.lsn]);
    let mut damaged = 0;
    for lsn in ends {
        match snapshot.view(lsn).expect("a point").read(whole()) {
            Ok(found) => assert_same(&found, &world.agent().model.at(lsn), lsn),
            Err(LogError::Damaged { .. }) => damaged += 1,
            Err(error) => panic!("{error}"),
        }
    }
    damaged
}

#[test]
fn a_power_cut_at_any_change_of_a_mend_beside_ingest_costs_nothing() {
    let (mut cuts, mut damaged, mut overwritten) = (0, 0, 0);
    let seeds = seeds(2);
    for &seed in &seeds {
        let world = settled(seed);
        let disk = world.agent().model.at(Lsn(u64::MAX));
        let begins = Begins::of(&world.snapshot());
        let places = places(&world, &disk, &mut Random(seed));
        for cut in 0..CHANGES_MAX {
            let _say = SayOnPanic(format!("SEED={seed}, the power cut at change {cut}: {places:?}"));
            let world = world.fork();
            damage(&world, &places);
            let mut world = world.reopened().expect("it is opened all the same");
            world.memory.cut_power_after(cut);
            let mended = mend(&world, &disk);
            let ended = !world.memory.is_off();
            if ended {
                world.memory.cut_power_after(u64::MAX >> 1);
                assert!(mended.expect("no fault").is_sound());
                cuts += cut;
            }
            world.memory.crash(seed ^ cut);
            world.reopen().expect("a log survives a power cut");
            damaged += read_some(&world, &world.snapshot());
            world.attach_again();
            let again = mend(&world, &disk).expect("no fault");
            assert!(again.mended.is_empty() || !ended, "{again:?}");
            if again.is_sound() {
                world.agent().flush_all();
                world.crash_and_check(!cut, &[&begins]);
            } else {
                // The guest has written over what only its disk still had: that is lost, and said.
                overwritten += 1;
                world.reopen().expect("open");
                read_some(&world, &world.snapshot());
            }
            if ended {
                break;
            }
        }
    }
    let lives = seeds.len() as u64;
    assert!(cuts > 10 * lives && damaged > 0, "{cuts} cuts, {damaged} points met damage");
    assert!(overwritten < cuts / 2, "{overwritten} of {cuts} could not be mended");
}
