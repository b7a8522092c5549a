//! Fencing where the log that knows the newest attach is damaged.

use std::path::PathBuf;

use backtide_protocol::{CloseCode, Hello, Message};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteOffset, Epoch};
use uuid::Uuid;

use super::fixture::*;

fn of_epoch(epoch: u64) -> Hello {
    Hello { epoch: Epoch(epoch), attach: Uuid::from_u128(epoch.into()), ..hello() }
}

/// A disk of epoch 5 with entries that are durable.
fn used() -> (Bench, Peer) {
    let mut bench = Bench::new();
    let (mut peer, _) = bench.welcomed(of_epoch(5));
    peer.tell(&mut bench, pass_begin(5, 0));
    peer.tell(&mut bench, pass_end(5));
    bench.commit(disk(7));
    // The system writes by and by what nobody synced.
    let dir = log_dir(&bench);
    bench.storage.open(&dir.join("disk.json")).unwrap().sync_data().unwrap();
    bench.storage.sync_dir(&dir).unwrap();
    (bench, peer)
}

fn log_dir(bench: &Bench) -> PathBuf {
    let (path, _) = segment(bench);
    path.parent().unwrap().parent().unwrap().to_owned()
}

fn segment(bench: &Bench) -> (PathBuf, Vec<u8>) {
    let files = bench.storage.files();
    files.into_iter().find(|(path, _)| path.extension().is_some_and(|name| name == "seg")).unwrap()
}

/// Damages the header of the only segment: the log cannot be opened any more.
fn damage_header(bench: &Bench) {
    bench.storage.flip_bit(&segment(bench).0, ByteOffset(20), 1);
}

fn assert_nothing_was_made(bench: &Bench) {
    let made = bench.storage.files().into_iter().find(|(path, _)| path.to_string_lossy().contains("log-2"));
    assert_eq!(made, None);
}

fn assert_refuses_what_is_older(bench: &mut Bench) {
    assert_eq!(bench.refused(of_epoch(3)).0, CloseCode::Fenced);
    assert_eq!(bench.refused(Hello { attach: Uuid::from_u128(99), ..of_epoch(5) }).0, CloseCode::Fenced);
    let smaller = Hello { size: ByteCount(SIZE.0 / 2), ..of_epoch(6) };
    assert_eq!(bench.refused(smaller).0, CloseCode::Refused);
}

#[test]
fn a_log_that_failed_and_is_damaged_fences_without_being_read() {
    for remembered in [true, false] {
        let (mut bench, mut peer) = used();
        peer.tell(&mut bench, write(6, 5));
        bench.storage.fail_sync_after(0);
        bench.commit(disk(7));
        assert!(bench.disks.get(disk(7)).unwrap().failure().is_some());
        damage_header(&bench);
        if !remembered {
            bench.storage.remove(&log_dir(&bench).join("disk.json")).unwrap();
        }
        assert_refuses_what_is_older(&mut bench);
        assert_nothing_was_made(&bench);
        // Whoever may have it gets a new log, and that one fences too.
        bench.welcomed(of_epoch(5));
        assert_refuses_what_is_older(&mut bench);
    }
}

#[test]
fn a_new_log_without_an_attach_is_fenced_by_the_damaged_one_before_it() {
    let mut bare = 0;
    for seed in 0..20 {
        let (mut bench, _) = used();
        damage_header(&bench);
        bench.restart();
        // The new log is durable, the claim in it is not.
        let mut peer = bench.connect();
        peer.tell(&mut bench, Message::Hello(of_epoch(6)));
        bench.storage.crash(seed);
        bench.restart();
        let timeline = bench.disks.get(disk(7)).unwrap().timeline();
        bare += u32::from(timeline.is_some_and(|timeline| timeline.attached().is_none()));
        for _ in 0..2 {
            assert_refuses_what_is_older(&mut bench);
            bench.restart();
        }
        bench.welcomed(of_epoch(6));
        assert_eq!(bench.refused(of_epoch(5)).0, CloseCode::Fenced, "seed {seed}");
    }
    assert!(bare > 0, "every power cut left an attach");
}
