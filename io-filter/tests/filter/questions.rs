//! What a comparison takes in memory while the receiver answers nothing.

use backtide_io_filter::{Effect, Filter, LocalData, LocalOp, Resume, Settings};
use backtide_protocol::{CompareResult, Message, ReceiverState};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, Lsn, Reason};

use crate::common::{HISTORY, at, settings, welcome};

const SIZE: ByteCount = ByteCount(4 << 30);

/// A disk of zeroes that may all be data, as of a device: reads what it is told to. So many reads it asked for.
fn read(filter: &mut Filter) -> usize {
    let mut reads = 0;
    while let Some(effect) = filter.next_effect() {
        match effect {
            Effect::Scan(io) => {
                filter.scanned(at(0), io, &DirtyBitmap::of(BlockRange::whole_disk(SIZE)));
            }
            Effect::Local(io, LocalOp::Read(range)) => {
                reads += 1;
                let zeroes = vec![0; usize::try_from(range.count().0).unwrap()];
                filter.local_done(at(0), io, Ok(LocalData::Read(zeroes.into())));
            }
            _ => {}
        }
    }
    reads
}

#[test]
fn questions_about_zeroes_that_nobody_answers_are_bounded_as_content_is() {
    let settings = Settings { size: SIZE, resync_buffer_bytes: ByteCount(1 << 20), ..settings() };
    let resume = Resume::Lost {
        reason: Reason::AgentCrashed,
        history: Some(HISTORY),
        last_lsn: Lsn(200),
        acked_durable: Lsn(100),
    };
    let mut filter = Filter::new(settings, resume, at(0));
    filter.connected(at(0), &welcome(ReceiverState::Known, Lsn(100)));
    // Each is about a MiB in 16 chunks: more than a thousand would not fit, of the disk's 4096.
    let reads = read(&mut filter);
    assert!((1..1000).contains(&reads), "{reads} questions");
    let mut asked: Vec<u64> = Vec::new();
    while let Some((_, message)) = filter.poll_send(at(0)) {
        if let Message::Compare(question) = message {
            asked.push(question.id);
        }
    }
    assert_eq!(asked.len(), reads);
    for id in asked {
        filter.receive(at(0), Message::CompareResult(CompareResult { id, differing: Vec::new() }));
    }
    let more = read(&mut filter);
    assert!((1..1000).contains(&more), "as many again: {more}");
}
