//! What was sent of a pass takes memory until it is durable: a receiver whose device stands still gets no more of it.

use std::time::Duration;

use backtide_io_filter::{Effect, Filter, LocalData, LocalOp, Now, Resume, Settings};
use backtide_protocol::{Message, ReceiverState};
use backtide_tracking::DirtyBitmap;
use backtide_units::{ByteCount, CaptureTime, LogPosition, Lsn};
use bytes::Bytes;

use crate::common::{settings, welcome};

/// More than may be on its way at once.
const RUNS: u64 = 40_000;

const NOW: Now = Now { monotonic: Duration::ZERO, wall: CaptureTime(1_000_000) };

/// Does what the filter asks for until it asks for no more; how many runs were read, and the last frame that was sent.
fn go_on(filter: &mut Filter, sent: &mut u64) -> u64 {
    let mut reads = 0;
    loop {
        let mut waits = true;
        while let Some(effect) = filter.next_effect() {
            waits = false;
            if let Effect::Local(io, LocalOp::Read(range)) = effect {
                reads += 1;
                let data = Bytes::from(vec![1; range.count().0 as usize]);
                filter.local_done(NOW, io, Ok(LocalData::Read(data)));
            }
        }
        while let Some((seq, _)) = filter.poll_send(NOW) {
            (waits, *sent) = (false, seq);
        }
        if waits {
            return reads;
        }
    }
}

#[test]
fn a_pass_waits_for_a_receiver_that_makes_nothing_durable_and_goes_on_when_it_does() {
    // Every other block, which no read takes together.
    let size = ByteCount(2 * RUNS * 4096);
    let mut filter = Filter::new(Settings { size, ..settings() }, Resume::New, NOW);
    filter.connected(NOW, &welcome(ReceiverState::New, Lsn::ZERO));
    let scan = std::iter::from_fn(|| filter.next_effect());
    let scan = scan.filter_map(|effect| if let Effect::Scan(io) = effect { Some(io) } else { None }).last();
    let mut allocated = DirtyBitmap::new();
    for run in 0..RUNS {
        allocated.insert((2 * run..2 * run + 1).into());
    }
    filter.scanned(NOW, scan.expect("a scan was asked for"), &allocated);
    let (mut read, mut sent) = (0, 0);
    loop {
        let reads = go_on(&mut filter, &mut sent);
        read += reads;
        // All of it is in memory there, and none of it durable.
        filter.receive(NOW, Message::Ack { received: sent, durable: 1, position: LogPosition(1) });
        if reads == 0 {
            break;
        }
    }
    assert!((1 << 15..(1 << 15) + 16).contains(&read), "{read} runs of {RUNS} are on their way");
    filter.receive(NOW, Message::Ack { received: sent, durable: sent, position: LogPosition(sent) });
    while read < RUNS {
        let reads = go_on(&mut filter, &mut sent);
        assert!(reads > 0, "it stands still at {read} of {RUNS} runs");
        read += reads;
        filter.receive(NOW, Message::Ack { received: sent, durable: sent, position: LogPosition(sent) });
    }
}
