//! Another host takes the disk over: an agent there claims it with a higher epoch, makes what it holds the
//! newest content, and leaves. From then on the first agent changes nothing at the receiver, whatever was on its
//! way, and its guest is served all the same. (Promise 8.)

use backtide_io_filter::Now;
use backtide_protocol::{CloseCode, Data, Hello, Message};
use backtide_units::{BlockRange, Epoch, Lsn, Reason};
use uuid::Uuid;

use crate::{
    config::Config,
    content::{bytes_of, disk_size},
    receiver::{HISTORY, TIME, Taken},
    world::World,
};

/// The other host's agent, once it has had the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Rival {
    /// T of its pass.
    pub(crate) at: Lsn,
    /// How long the log is with all it has written.
    entries: usize,
}

/// A takeover's epoch lies so far above, that no restart of the first agent reaches it.
const EPOCHS_AHEAD: u64 = 100;

impl Rival {
    /// What its disk holds.
    pub(crate) fn value(block: u8) -> u8 {
        0xe0 + block
    }
}

impl World {
    /// What the other agent says: its hello, and its frames.
    pub(crate) fn rival_says(&self, config: &Config) -> (Hello, Vec<Message>) {
        let own = self.filter.hello();
        let epoch = Epoch(own.epoch.0 + EPOCHS_AHEAD);
        let (history, attach) = (Some(HISTORY), Uuid::from_u128(epoch.0.into()));
        let timeline = &self.receiver.timeline;
        let next_lsn = timeline.highest_lsn().max(own.next_lsn).next();
        let (at, gap_from) = (next_lsn, timeline.covered());
        // A log's times never go back.
        let time = timeline.last_time().map_or(TIME, |last| last.max(TIME));
        let range = BlockRange::whole_disk(disk_size(config.blocks)).bytes(disk_size(config.blocks));
        let data = Data::capture(bytes_of(range, Rival::value));
        let frames = vec![
            Message::PassBegin { at, gap_from, time, reason: Reason::ForeignHistory },
            Message::PassData { at, range, data },
            Message::PassEnd { at, valid_from: Some(at), time },
        ];
        (Hello { epoch, attach, history, next_lsn, ..own }, frames)
    }

    pub(crate) fn rival_takes_over(&mut self, config: &Config) {
        let (hello, frames) = self.rival_says(config);
        self.receiver.claim(&hello, 1).expect("a higher epoch gets the disk");
        for other in self.connections.iter_mut().filter(|other| other.owns) {
            other.close(CloseCode::Fenced, "another host has the disk");
        }
        self.receiver.sync();
        for frame in frames {
            let fine = matches!(self.receiver.take(frame), Taken::Fine);
            assert!(fine, "who has the disk may write");
        }
        self.receiver.sync();
        self.rival = Some(Rival { at: hello.next_lsn, entries: self.receiver.log.len() });
        self.forget_ended();
        self.call(config, |filter, now: Now| filter.tick(now));
    }

    /// Nobody has written to the log since.
    pub(crate) fn check_rival(&self, rival: Rival) {
        let entries = self.receiver.log.len();
        assert_eq!(entries, rival.entries, "the agent that was fenced has written to the log");
        assert_eq!(self.receiver.durable, entries, "it was durable before anybody was told");
    }
}
