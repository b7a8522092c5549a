//! A server that is back is given what the last one may have lost: as fast as it takes that, for as long as it does.

use super::*;

/// Less than a server may take for an answer, and two of them more than an outage may last.
const SLOWLY: Duration = Duration::from_secs(6);

fn block(number: u64, fua: bool) -> LocalOp {
    let range = ByteRange::new(ByteOffset(number * 4096), ByteCount(4096)).unwrap();
    LocalOp::Change(Change::Write { range, data: Bytes::from(vec![7; 4096]), fua })
}

fn reading(disk: &NbdDisk) -> tokio::task::JoinHandle<bool> {
    let other = same(disk);
    tokio::task::spawn_local(async move { other.run(read()).await.is_ok() })
}

/// Waits until the server owes so many answers, and has got nothing more.
async fn owes(behind: &Behind, answers: usize) {
    while behind.unanswered.borrow().len() < answers {
        behind.asked.notified().await;
    }
    assert_eq!(behind.unanswered.borrow().len(), answers);
}

async fn time_goes_by() {
    tokio::time::pause();
    tokio::time::advance(SLOWLY).await;
    tokio::time::resume();
}

#[test]
fn changes_that_do_not_overlap_are_made_side_by_side_and_others_in_their_order() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        for number in [10, 12, 14, 10, 16, 10] {
            disk.run(block(number, false)).await.unwrap();
        }
        server.shutdown(Duration::ZERO).await;
        behind.stands_still.set(true);
        behind.changes.take();
        let _server = serve(&behind, &socket).await;
        let reading = reading(&disk);
        // The fourth overlaps, and what comes after it waits with it.
        owes(&behind, 4).await;
        behind.unanswered.take().into_iter().for_each(Reply::done);
        owes(&behind, 2).await;
        behind.goes_on();
        assert!(reading.await.unwrap());
        let made: Vec<u64> = behind.changes.take().iter().map(|(range, _)| range.start().0 / 4096).collect();
        assert_eq!(made, [2, 10, 12, 14, 10, 16, 10]);
    });
}

#[test]
fn what_was_stable_at_once_is_made_so_by_one_flush() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        for number in 4..8 {
            disk.run(block(number, true)).await.unwrap();
        }
        server.shutdown(Duration::ZERO).await;
        behind.changes.take();
        let flushes = behind.flushes.get();
        let _server = serve(&behind, &socket).await;
        assert!(reading(&disk).await.unwrap());
        let stable = behind.changes.take().iter().filter(|(_, fua)| *fua).count();
        assert_eq!((stable, behind.flushes.get()), (0, flushes + 1));
        assert_eq!(disk.shared.unflushed.borrow().changes(), []);
    });
}

#[test]
fn requests_wait_for_as_long_as_a_server_answers() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        for _ in 0..4 {
            disk.run(write()).await.unwrap();
        }
        server.shutdown(Duration::ZERO).await;
        behind.stands_still.set(true);
        let _server = serve(&behind, &socket).await;
        let reading = reading(&disk);
        for _ in 0..5 {
            owes(&behind, 1).await;
            time_goes_by().await;
            behind.unanswered.take().into_iter().for_each(Reply::done);
        }
        assert!(reading.await.unwrap());
    });
}

#[test]
fn a_server_that_ends_again_and_again_before_it_has_done_more_keeps_nobody_waiting() {
    on_stage(async |Stage { behind, socket, mut server, disk }| {
        disk.run(write()).await.unwrap();
        behind.stands_still.set(true);
        let mut waiting = None;
        for _ in 0..4 {
            server.shutdown(Duration::ZERO).await;
            server = serve(&behind, &socket).await;
            waiting.get_or_insert_with(|| reading(&disk));
            owes(&behind, 1).await;
            time_goes_by().await;
            behind.unanswered.take().into_iter().for_each(Reply::done);
            owes(&behind, 1).await;
            behind.unanswered.take();
        }
        let waiting = waiting.expect("somebody waits");
        assert!(waiting.is_finished() && !waiting.await.unwrap());
    });
}

#[test]
fn zeroes_are_made_again_in_pieces() {
    on_stage_of(LARGE, async |Stage { behind, socket, server, disk }| {
        let range = ByteRange::new(ByteOffset(1 << 20), ByteCount(256 << 20)).unwrap();
        disk.run(LocalOp::Change(Change::Zero { range, trim: true, fua: false })).await.unwrap();
        server.shutdown(Duration::ZERO).await;
        behind.stands_still.set(true);
        behind.changes.take();
        let _server = serve(&behind, &socket).await;
        let reading = reading(&disk);
        for _ in 0..6 {
            owes(&behind, 1).await;
            time_goes_by().await;
            behind.unanswered.take().into_iter().for_each(Reply::done);
        }
        assert!(reading.await.unwrap());
        let made = behind.changes.take();
        assert!(made[1..].iter().all(|(piece, _)| range.contains(*piece) && piece.count().0 <= 64 << 20));
        assert_eq!(made[1..].iter().map(|(piece, _)| piece.count().0).sum::<u64>(), range.count().0);
    });
}
