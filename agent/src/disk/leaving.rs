//! The ways a disk is given up, how long each may take, and why it may not come about.

use std::{io, path::PathBuf, rc::Rc, time::Duration};

use backtide_agent_api::GuestWaits;
use backtide_export::Server;
use backtide_io_filter::Filter;

use super::engine::Engine;

/// How long a detach waits for requests in flight and for the receiver.
const DETACH_GRACE: Duration = Duration::from_secs(5);

/// The same of a disk that is handed over: a part of the pause its guest sees.
const HAND_OVER_GRACE: Duration = Duration::from_millis(100);

/// How a disk is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// By a person: refused with the number of clients while it is open.
    Asked {
        /// Who had it open before and is not there does not come back, as the person knows.
        nobody_returns: bool,
    },
    /// By a person who knows that clients have it open: what they wait for is answered with an error.
    Forced,
    /// With its agent, whoever has it open.
    Stopped,
    /// To be attached again at once with another size.
    Resized {
        /// Clients connect again; without, it is refused as when it is asked.
        reconnect: bool,
    },
    /// To be attached again at once at another point.
    SetBack {
        /// As many clients connect again, none for any number; with more it is refused as when it is asked.
        clients_max: Option<u32>,
    },
    /// To the agent that follows at once, for which clients wait.
    HandedOver,
}

impl Leaving {
    /// Whether the disk stays while so many have it open, or had and may come back.
    pub(super) fn spares(self, clients: usize) -> bool {
        let max = match self {
            Self::Asked { .. } | Self::Resized { reconnect: false } => Some(0),
            Self::SetBack { clients_max } => clients_max,
            Self::Resized { reconnect: true } | Self::Forced | Self::Stopped | Self::HandedOver => None,
        };
        max.is_some_and(|max| clients > max as usize)
    }

    /// Why the stream ends, for the receiver and whoever reads its log.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Asked { .. } => "detached by an operator",
            Self::Forced => "detached by an operator, by force",
            Self::Stopped => "the agent ends",
            Self::Resized { .. } => "the disk is attached again with another size",
            Self::SetBack { .. } => "the disk is set back to an earlier point",
            Self::HandedOver => "the agent is restarted",
        }
    }

    /// How long requests in flight may take. Those that take longer are sent again by their clients.
    pub(super) fn requests(self) -> Duration {
        match self {
            Self::HandedOver => HAND_OVER_GRACE,
            _ => DETACH_GRACE,
        }
    }

    /// How long the receiver may take. What it has not acknowledged by then is resynchronized.
    pub(super) fn receiver(self) -> Duration {
        match self {
            Self::HandedOver => HAND_OVER_GRACE,
            _ => DETACH_GRACE,
        }
    }
}

/// Ends what clients have of a disk. What was given up of it with an error, for clients that waited for the receiver.
pub(super) async fn end_service(
    engine: &Rc<Engine>,
    server: Server,
    leaving: Leaving,
    waits: Option<GuestWaits>,
) -> Option<GuestWaits> {
    match leaving {
        // A client that reconnects to what serves the disk next sends again what was not begun; an
        // error would reach the guest.
        Leaving::Stopped | Leaving::Resized { .. } | Leaving::SetBack { .. } | Leaving::HandedOver => {
            server.hand_over(leaving.requests()).await;
            None
        }
        // Clients have gone: nobody hears what becomes of their last requests, which might wait for ever.
        Leaving::Asked { .. } => {
            engine.happen(Filter::give_up_answers);
            server.hand_over(leaving.requests()).await;
            None
        }
        Leaving::Forced => {
            let requests = engine.happen(Filter::give_up_answers);
            server.shutdown(leaving.requests()).await;
            let seconds = waits.map_or(0.0, |waits| waits.seconds);
            (requests > 0).then_some(GuestWaits { requests, seconds })
        }
    }
}

/// Why a disk stays attached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DetachError {
    /// Clients would lose their disk.
    #[error("{}{}", open_by(*clients, *awaited), if *waits { ", and waits for the receiver" } else { "" })]
    Open {
        /// How many connections.
        clients: usize,
        /// How many had it open when its service was interrupted, and have not come back.
        awaited: u32,
        /// Whether one waits for the receiver, and will as long as that is away.
        waits: bool,
    },
    /// What the next attach needs could not be saved; the disk is detached all the same and will be
    /// compared as after a crash.
    #[error(
        "the disk is detached, but {} could not be saved, so all of it will be compared at the next attach: {source}",
        path.display()
    )]
    Save {
        /// What could not be saved.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn open_by(clients: usize, awaited: u32) -> String {
    match clients {
        0 => awaited_text(awaited),
        1 => "an NBD client has the disk open".to_owned(),
        clients => format!("{clients} NBD clients have the disk open"),
    }
}

/// Of clients that have not come back.
pub(crate) fn awaited_text(awaited: u32) -> String {
    let who = match awaited {
        1 => "an NBD client that had the disk open when its service was interrupted has".to_owned(),
        awaited => {
            format!("{awaited} NBD clients that had the disk open when its service was interrupted have")
        }
    };
    format!("{who} not come back, as an idle virtual machine does only with its next request")
}
