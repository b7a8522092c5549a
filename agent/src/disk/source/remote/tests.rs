//! The client of a point against a receiver that a test plays, frame by frame.

use std::path::Path;

use backtide_control::Address;
use backtide_protocol::{Data, Ping, ReadFailure};
use backtide_units::{ByteCount, ByteOffset, CaptureTime};
use bytes::Bytes;
use tokio::{
    net::{UnixListener, UnixStream},
    task::LocalSet,
};
use uuid::Uuid;

use super::*;

/// One connection of the receiver that is played.
struct Peer {
    stream: UnixStream,
    decoder: Decoder,
    sent: u64,
}

fn known() -> SourcePoint {
    SourcePoint {
        receiver: "unix:/run/receiver.sock".to_owned(),
        disk: DiskId(Uuid::from_u128(1)),
        name: "vm1".parse().unwrap(),
        history: HistoryId(Uuid::from_u128(2)),
        lsn: Lsn(40),
        time: CaptureTime(7),
        size: ByteCount(64 << 20),
    }
}

fn opened() -> PointOpened {
    let SourcePoint { disk, name, history, lsn, time, size, .. } = known();
    PointOpened { version: PROTOCOL_VERSION, disk, name, size, lsn, time, history, latest: Lsn(50) }
}

fn dialer(socket: &Path) -> Dialer {
    Dialer::new(Address::unix(socket), None)
}

fn block(index: u64) -> ByteRange {
    ByteRange::new(ByteOffset(index * 4096), ByteCount(4096)).unwrap()
}

impl Peer {
    /// The next connection, which has to ask for the point that the client knows.
    async fn accept(listener: &UnixListener, answer: Message) -> Self {
        let stream = listener.accept().await.unwrap().0;
        let mut peer = Self { stream, decoder: Decoder::new(), sent: 0 };
        let Reading::Open(open) = peer.next().await.unwrap() else { panic!("a point is opened first") };
        assert_eq!(open.disk.as_str(), known().disk.to_string());
        assert_eq!((open.history, open.lsn), (Some(known().history), Some(known().lsn)));
        peer.send(answer).await;
        peer
    }

    async fn opened(listener: &UnixListener) -> Self {
        Self::accept(listener, Message::Reading(Reading::Opened(opened()))).await
    }

    async fn send(&mut self, message: Message) {
        self.sent += 1;
        let (header, payload) = encode(self.sent, &message);
        self.stream.write_all(&header).await.unwrap();
        self.stream.write_all(&payload).await.unwrap();
    }

    async fn say(&mut self, reading: Reading) {
        self.send(Message::Reading(reading)).await;
    }

    async fn next(&mut self) -> Option<Reading> {
        loop {
            match self.decoder.next_message().unwrap() {
                Some(message) => {
                    let Message::Reading(reading) = message.message else { panic!("{message:?}") };
                    return Some(reading);
                }
                None if self.stream.read_buf(self.decoder.buffer()).await.unwrap() == 0 => return None,
                None => {}
            }
        }
    }

    async fn fetch(&mut self) -> (u64, ByteRange) {
        match self.next().await {
            Some(Reading::Fetch { id, range }) => (id, range),
            other => panic!("expected a fetch, found {other:?}"),
        }
    }

    /// The range is data of `byte`, and zeroes behind the first 512 bytes.
    async fn answer(&mut self, id: u64, range: ByteRange, byte: u8) {
        let middle = ByteOffset(range.start().0 + 512);
        let (data, zeroes) =
            (ByteRange::between(range.start(), middle), ByteRange::between(middle, range.end()));
        let bytes = Bytes::from(vec![byte; 512]);
        self.say(Reading::Piece { id, range: data, data: Data::capture(bytes) }).await;
        // Of another question, between the parts of this one.
        self.send(Message::Ping(Ping::default())).await;
        self.say(Reading::Piece { id, range: zeroes, data: Data::capture(Bytes::new()) }).await;
        self.say(Reading::Answered { id }).await;
    }
}

/// Runs `client` with the known point against `peer`.
async fn run(client: impl AsyncFnOnce(Rc<dyn PointSource>), peer: impl AsyncFnOnce(UnixListener)) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("receiver.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let both = async { tokio::join!(client(remote(known(), dialer(&socket))), peer(listener)) };
    LocalSet::new().run_until(both).await;
}

#[tokio::test]
async fn every_question_gets_its_own_answer_in_whatever_order_they_come() {
    let client = async |source: Rc<dyn PointSource>| {
        let mut asking = tokio::task::JoinSet::new();
        for index in 0..40 {
            let source = Rc::clone(&source);
            asking.spawn_local(async move { (index, source.fetch(block(index)).await.unwrap()) });
        }
        while let Some(answered) = asking.join_next().await {
            let (index, pieces) = answered.unwrap();
            let [(first, Piece::Data(bytes)), (second, Piece::Zeroes)] = &pieces[..] else {
                panic!("{pieces:?}")
            };
            assert_eq!(bytes, &vec![index as u8; 512]);
            assert_eq!((first.start(), second.end()), (block(index).start(), block(index).end()));
        }
    };
    let peer = async |listener: UnixListener| {
        let mut peer = Peer::opened(&listener).await;
        let mut left = 40;
        while left > 0 {
            // As many as it asks at once, and the last of them first.
            let mut out = Vec::new();
            for _ in 0..left.min(16) {
                out.push(peer.fetch().await);
            }
            left -= out.len();
            while let Some((id, range)) = out.pop() {
                peer.answer(id, range, (range.start().0 / 4096) as u8).await;
            }
        }
    };
    run(client, peer).await;
}

#[tokio::test]
async fn blocks_holds_and_failures_are_told_apart() {
    let client = async |source: Rc<dyn PointSource>| {
        let mut expected = DirtyBitmap::of(BlockRange::between(BlockIndex(2), BlockIndex(5)));
        expected.insert(BlockRange::between(BlockIndex(9), BlockIndex(10)));
        assert_eq!(source.changed(Lsn(44)).await, Ok(expected));
        source.hold("vm1 on kvm-3").await.unwrap();
        source.release("vm1 on kvm-3").await.unwrap();
        let damaged = FetchError::Damaged("segment 3 is damaged".to_owned());
        assert_eq!(source.fetch(block(1)).await, Err(damaged));
        assert_eq!(source.data().await, Err(FetchError::Refused("gone".to_owned())));
    };
    let peer = async |listener: UnixListener| {
        let mut peer = Peer::opened(&listener).await;
        let Some(Reading::AskBlocks { id, which: Blocks::Changed(Lsn(44)) }) = peer.next().await else {
            panic!()
        };
        peer.say(Reading::Blocks { id, first: BlockIndex(0), blocks: [2, 3, 4, 9].into_iter().collect() })
            .await;
        peer.say(Reading::Answered { id }).await;
        let Some(Reading::Hold { id, owner }) = peer.next().await else { panic!() };
        peer.say(Reading::Answered { id }).await;
        let Some(Reading::Release { id, owner: released }) = peer.next().await else { panic!() };
        assert_eq!((owner.as_str(), &released), ("vm1 on kvm-3", &owner));
        peer.say(Reading::Answered { id }).await;
        let (id, _) = peer.fetch().await;
        let fail = |id, code, message: &str| Reading::Failed {
            id,
            failure: ReadFailure { code, message: message.to_owned() },
        };
        peer.say(fail(id, backtide_protocol::FailureCode::Damaged, "segment 3 is damaged")).await;
        let Some(Reading::AskBlocks { id, which: Blocks::Data }) = peer.next().await else { panic!() };
        peer.say(fail(id, backtide_protocol::FailureCode::Gone, "gone")).await;
    };
    run(client, peer).await;
}

#[tokio::test]
async fn a_lost_stream_is_told_to_whoever_waits_and_the_next_question_makes_another() {
    let client = async |source: Rc<dyn PointSource>| {
        let (one, two) = tokio::join!(source.fetch(block(0)), source.fetch(block(1)));
        for lost in [one, two] {
            assert!(matches!(lost, Err(FetchError::Unreachable(why)) if why.contains("lost")));
        }
        assert!(source.fetch(block(2)).await.is_ok());
        // The receiver has ended this one while nobody asked, which nobody has to know.
        assert!(source.fetch(block(3)).await.is_ok());
    };
    let peer = async |listener: UnixListener| {
        let mut first = Peer::opened(&listener).await;
        let (id, range) = first.fetch().await;
        first.fetch().await;
        let half = ByteRange::between(range.start(), ByteOffset(range.start().0 + 512));
        first.say(Reading::Piece { id, range: half, data: Data::capture(vec![1; 512].into()) }).await;
        drop(first);
        for _ in 2..4 {
            let mut next = Peer::opened(&listener).await;
            let (id, range) = next.fetch().await;
            next.answer(id, range, 9).await;
        }
    };
    run(client, peer).await;
}

#[tokio::test]
async fn a_point_that_is_held_is_held_again_over_each_new_stream_until_it_is_released() {
    let client = async |source: Rc<dyn PointSource>| {
        source.hold("vm1 on kvm-3").await.unwrap();
        source.hold("vm2 on kvm-3").await.unwrap();
        for nth in 0..3 {
            assert!(source.fetch(block(nth)).await.is_ok());
        }
        source.release("vm1 on kvm-3").await.unwrap();
        source.release("vm2 on kvm-3").await.unwrap();
        assert!(source.fetch(block(9)).await.is_ok());
    };
    let held = async |peer: &mut Peer, expected: &str| {
        let Some(Reading::Hold { id, owner }) = peer.next().await else { panic!("it is held first") };
        assert_eq!(owner, expected);
        id
    };
    let peer = async |listener: UnixListener| {
        let mut peer = Peer::opened(&listener).await;
        for owner in ["vm1 on kvm-3", "vm2 on kvm-3"] {
            let id = held(&mut peer, owner).await;
            peer.say(Reading::Answered { id }).await;
        }
        drop(peer);
        for nth in 0..3 {
            let mut peer = Peer::opened(&listener).await;
            let id = held(&mut peer, "vm1 on kvm-3").await;
            match nth {
                // Gone: what is open is read all the same.
                1 => {
                    let (code, message) = (backtide_protocol::FailureCode::Gone, "gone".to_owned());
                    peer.say(Reading::Failed { id, failure: ReadFailure { code, message } }).await;
                }
                _ => peer.say(Reading::Answered { id }).await,
            }
            let id = held(&mut peer, "vm2 on kvm-3").await;
            peer.say(Reading::Answered { id }).await;
            let (id, range) = peer.fetch().await;
            peer.answer(id, range, 9).await;
            if nth == 2 {
                for _ in 0..2 {
                    let Some(Reading::Release { id, .. }) = peer.next().await else { panic!() };
                    peer.say(Reading::Answered { id }).await;
                }
            }
        }
        let mut peer = Peer::opened(&listener).await;
        let (id, range) = peer.fetch().await;
        peer.answer(id, range, 9).await;
    };
    run(client, peer).await;
}

#[tokio::test]
async fn a_receiver_that_does_not_give_the_point_is_no_lost_one() {
    let client = async |source: Rc<dyn PointSource>| {
        assert_eq!(source.fetch(block(0)).await, Err(FetchError::Refused("no such point".to_owned())));
        assert_eq!(source.fetch(block(0)).await, Err(FetchError::Unreachable("shutting down".to_owned())));
        // Another point than the one that was asked for, another size, and bytes that nobody asked for.
        for _ in 0..4 {
            let wrong = source.fetch(block(0)).await.unwrap_err();
            assert!(!matches!(wrong, FetchError::Damaged(_)), "{wrong}");
        }
    };
    let peer = async |listener: UnixListener| {
        for (code, why) in [(CloseCode::Refused, "no such point"), (CloseCode::Bye, "shutting down")] {
            Peer::accept(&listener, Message::Close(Closed::new(code, why))).await;
        }
        let other = PointOpened { lsn: Lsn(41), ..opened() };
        Peer::accept(&listener, Message::Reading(Reading::Opened(other))).await;
        let grown = PointOpened { size: ByteCount(1 << 30), ..opened() };
        Peer::accept(&listener, Message::Reading(Reading::Opened(grown))).await;
        // Each of these ends its stream.
        let mut peer = Peer::opened(&listener).await;
        let (id, _) = peer.fetch().await;
        peer.say(Reading::Piece { id, range: block(7), data: Data::capture(Bytes::new()) }).await;
        let mut peer = Peer::opened(&listener).await;
        let (id, _) = peer.fetch().await;
        peer.say(Reading::Answered { id }).await;
    };
    run(client, peer).await;
}
