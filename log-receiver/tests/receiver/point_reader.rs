//! An agent that reads a point, reduced to the protocol.

use std::collections::BTreeMap;

use backtide_log_receiver::Receiver;
use backtide_protocol::{
    Blocks, Closed, FETCH_BYTES_MAX, Message, OpenPoint, PROTOCOL_VERSION, PointOpened, ReadFailure, Reading,
    collect_part,
};
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, Lsn};
use roaring::RoaringTreemap;

use crate::agent::Agent;

/// More than the receiver takes at once, and few enough for a socket to hold.
const OPEN_MAX: usize = 40;

/// One connection that reads a point.
pub(crate) struct PointReader {
    pub(crate) agent: Agent,
    pub(crate) opened: PointOpened,
    next: u64,
}

pub(crate) fn open(disk: &str, lsn: Option<u64>) -> OpenPoint {
    OpenPoint {
        version: PROTOCOL_VERSION,
        disk: disk.parse().unwrap(),
        history: None,
        lsn: lsn.map(Lsn),
        reader: "a test".to_owned(),
    }
}

impl PointReader {
    pub(crate) async fn open(receiver: &Receiver, open: OpenPoint) -> Self {
        let mut agent = Agent::connect(receiver).await;
        agent.send(&Message::Reading(Reading::Open(open))).await;
        match agent.next().await {
            Some(Message::Reading(Reading::Opened(opened))) => Self { agent, opened, next: 0 },
            other => panic!("expected a point, found {other:?}"),
        }
    }

    pub(crate) async fn refused(receiver: &Receiver, open: OpenPoint) -> Closed {
        let mut agent = Agent::connect(receiver).await;
        agent.send(&Message::Reading(Reading::Open(open))).await;
        agent.closed().await
    }

    /// Asks, and gives the id of the question.
    pub(crate) async fn ask(&mut self, question: impl Fn(u64) -> Reading) -> u64 {
        self.next += 1;
        self.agent.send(&Message::Reading(question(self.next))).await;
        self.next
    }

    /// Asks for bytes.
    pub(crate) async fn fetch(&mut self, offset: u64, count: u64) -> u64 {
        let range = ByteRange::new(ByteOffset(offset), ByteCount(count)).unwrap();
        self.ask(|id| Reading::Fetch { id, range }).await
    }

    /// The next message that is about the point.
    pub(crate) async fn next(&mut self) -> Reading {
        loop {
            match self.agent.next().await {
                Some(Message::Reading(reading)) => return reading,
                Some(Message::Ping(_)) => {}
                other => panic!("expected an answer, found {other:?}"),
            }
        }
    }

    /// Asks one question and gives what became of it.
    pub(crate) async fn done(&mut self, question: impl Fn(u64) -> Reading) -> Result<(), ReadFailure> {
        let asked = self.ask(question).await;
        loop {
            match self.next().await {
                Reading::Answered { id } if id == asked => return Ok(()),
                Reading::Failed { id, failure } if id == asked => return Err(failure),
                Reading::Piece { id, .. } if id == asked => {}
                other => panic!("expected the end of question {asked}, found {other:?}"),
            }
        }
    }

    pub(crate) async fn blocks(&mut self, which: Blocks) -> Result<RoaringTreemap, ReadFailure> {
        let asked = self.ask(|id| Reading::AskBlocks { id, which }).await;
        let mut whole = RoaringTreemap::new();
        loop {
            match self.next().await {
                Reading::Blocks { id, first, blocks } if id == asked => {
                    collect_part(&mut whole, first, &blocks, self.opened.size);
                }
                Reading::Answered { id } if id == asked => return Ok(whole),
                Reading::Failed { id, failure } if id == asked => return Err(failure),
                other => panic!("expected blocks, found {other:?}"),
            }
        }
    }

    /// What comes of questions for parts of the disk: each is answered with blocks of its own, and of no other.
    pub(crate) async fn part_by_part(&mut self, of: impl Fn(BlockRange) -> Blocks) -> RoaringTreemap {
        // Not in step with anything, and the last one ends beyond the disk.
        const PART: u64 = 37;
        let mut whole = RoaringTreemap::new();
        for start in (0..BlockRange::whole_disk(self.opened.size).end().0).step_by(PART as usize) {
            let part = BlockRange::from(start..start + PART);
            let told = self.blocks(of(part)).await.expect("blocks of a part");
            assert!(told.iter().all(|block| part.indices().contains(&block)), "{part:?}: {told:?}");
            whole |= told;
        }
        whole
    }

    /// The whole disk at the point, with more questions at once than the receiver takes.
    pub(crate) async fn image(&mut self, step: u64) -> Vec<u8> {
        assert!(step <= FETCH_BYTES_MAX);
        let size = self.opened.size.0;
        let mut image = vec![0xee; usize::try_from(size).unwrap()];
        let (mut open, mut asked) = (BTreeMap::new(), 0);
        while asked < size || !open.is_empty() {
            while asked < size && open.len() < OPEN_MAX {
                let count = step.min(size - asked);
                // What has come of each answer.
                open.insert(self.fetch(asked, count).await, (asked, asked + count));
                asked += count;
            }
            match self.next().await {
                Reading::Piece { id, range, data } => {
                    let (at, end) = open.get_mut(&id).expect("an open question");
                    assert!(range.start().0 == *at && range.end().0 <= *end, "pieces come in order");
                    *at = range.end().0;
                    let bytes = usize::try_from(range.start().0).unwrap()..usize::try_from(*at).unwrap();
                    match data.bytes().is_empty() {
                        true => image[bytes].fill(0),
                        false => image[bytes].copy_from_slice(data.bytes()),
                    }
                }
                Reading::Answered { id } => {
                    let (at, end) = open.remove(&id).expect("an open question");
                    assert_eq!(at, end, "the pieces cover what was asked for");
                }
                other => panic!("expected pieces, found {other:?}"),
            }
        }
        image
    }
}
