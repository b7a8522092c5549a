//! What a receiver is told of a disk beside its history, for whoever attaches the disk elsewhere: when its guest is answered,
//! also while the receiver is away, and the point of another disk that it began as.

use backtide_agent_api::{AckPolicy, OnOutage, Origin};
use backtide_protocol::{Hello, OriginPoint};

use crate::record::DiskRecord;

/// See the module's description.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    ack: backtide_protocol::AckPolicy,
    on_outage: backtide_protocol::OnOutage,
    origin: Option<OriginPoint>,
}

impl Terms {
    /// Of a disk.
    pub(crate) fn of(record: &DiskRecord) -> Self {
        let ack = match record.ack {
            AckPolicy::Local => backtide_protocol::AckPolicy::Local,
            AckPolicy::Received => backtide_protocol::AckPolicy::Received,
            AckPolicy::Durable => backtide_protocol::AckPolicy::Durable,
            AckPolicy::DurableEveryWrite => backtide_protocol::AckPolicy::DurableEveryWrite,
        };
        let on_outage = match record.on_outage {
            OnOutage::Continue => backtide_protocol::OnOutage::Continue,
            OnOutage::Block => backtide_protocol::OnOutage::Block,
        };
        let origin = record.origin.clone().map(|origin| {
            let Origin { receiver, disk, uuid, lsn, time } = origin;
            OriginPoint { receiver, disk: uuid, name: disk, lsn, time }
        });
        Self { ack, on_outage, origin }
    }

    /// The hello that says so too.
    pub(crate) fn tell(&self, hello: Hello) -> Hello {
        Hello { ack: Some(self.ack), on_outage: Some(self.on_outage), origin: self.origin.clone(), ..hello }
    }
}
