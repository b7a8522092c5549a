//! Gives up a server whose host is gone, and no other: one that takes nothing, because its storage stands still, is left
//! to take long.
//!
//! The system has a time for what stays unacknowledged, a quarter of an hour, and a shorter one can be asked for. But that
//! one also ends connections whose other end says, as often as it is asked, that it has no room yet. So this looks at
//! what was said. Invariant: whoever is given up has owed an acknowledgement all that time, and has sent none; or it has had
//! room all that time for something that was sent, and has not got it: the way there is gone, and perhaps not the way back.
//!
//! A host may leave a question unanswered that comes within half a second of another one, and answers the next.
//!
//! Where nothing is out, there is nothing to acknowledge; the kernel asks then (`alive.rs`).

use std::{io, task::Context, time::Duration};

use rustix::net::sockopt;
use tokio::{
    net::TcpStream,
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};

use super::other_host::{Ends, Heard};
use crate::ClientError;

/// How often is looked while somebody may be given up.
const LOOKS: u32 = 8;

/// Looks after one connection.
#[derive(Debug)]
pub(super) struct Watch {
    ends: Ends,
    /// Who owes for so long is given up.
    after: Duration,
    looks: Interval,
    owing: Owing,
    /// Whether this kernel does not tell: it has been told itself to give up who takes nothing.
    untold: bool,
}

impl Watch {
    /// Of a connection that is given up after this time, and not sooner than an eighth before it.
    pub(super) fn new(stream: &TcpStream, after: Duration) -> io::Result<Self> {
        let ends = Ends { here: stream.local_addr()?, there: stream.peer_addr()? };
        // No longer than that after a look.
        let pause = (after / LOOKS).max(Duration::from_millis(1));
        let mut looks = interval_at(Instant::now() + pause, pause);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The connection is there: whoever does not find it never will.
        let untold = ends.heard().err();
        if let Some(error) = &untold {
            let there = ends.there;
            tracing::warn!(%there, %error, "the kernel does not tell whether an NBD server's host is there: one whose storage stands still for {after:?} is given up, too");
            let millis = u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
            sockopt::set_tcp_user_timeout(stream, millis)?;
        }
        Ok(Self { ends, after, looks, owing: Owing::default(), untold: untold.is_some() })
    }

    /// Looks when it is time to, if anybody waits for the server. Wakes the task for the next look.
    ///
    /// # Errors
    /// When the other host is gone.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, is_waited_for: bool) -> Result<(), ClientError> {
        while self.looks.poll_tick(cx).is_ready() {
            if !is_waited_for || self.untold {
                self.owing = Owing::default();
                continue;
            }
            match self.ends.heard() {
                Ok(heard) => {
                    let owed = self.owing.since(Instant::now(), heard);
                    if owed + self.after / LOOKS >= self.after {
                        return Err(ClientError::HostGone { after: self.after });
                    }
                }
                // The connection has ended, which its next read tells.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // This host is short of something. Nobody is given up for what was not seen.
                Err(error) => {
                    tracing::debug!(there = %self.ends.there, %error, "the kernel does not tell of an NBD server's host");
                    self.owing = Owing::default();
                }
            }
        }
        Ok(())
    }
}

/// Since when the other host owes an acknowledgement.
#[derive(Debug, Default)]
struct Owing {
    /// Since when it has been seen to owe any.
    any: Option<Instant>,
    /// Since when it has not got further than so many bytes.
    taken: Option<(u64, Instant)>,
}

impl Owing {
    /// How long it has been seen to owe one that it has not sent.
    fn since(&mut self, now: Instant, heard: Heard) -> Duration {
        let before = self.any.map(|since| now.saturating_duration_since(since));
        // Anything that was heard meanwhile was an answer.
        let silent = before.filter(|silent| heard.owes && *silent <= heard.last).unwrap_or_default();
        self.any = heard.owes.then(|| now - silent);
        self.taken = heard.taken.map(|taken| match self.taken {
            Some((before, since)) if before == taken => (taken, since),
            Some(_) | None => (taken, now),
        });
        let stuck = self.taken.map(|(_, since)| now.saturating_duration_since(since));
        silent.max(stuck.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(last_ms: u64, owes: bool) -> Heard {
        Heard { last: Duration::from_millis(last_ms), owes, taken: None }
    }

    /// How long somebody has owed at the last of these looks, a second apart, in seconds.
    fn owed(looks: &[Heard]) -> u64 {
        let (mut owing, begin) = (Owing::default(), Instant::now());
        let seconds = |count: usize| Duration::from_secs(count as u64);
        let all = looks.iter().enumerate().map(|(at, heard)| owing.since(begin + seconds(at), *heard));
        all.last().unwrap().as_secs()
    }

    #[test]
    fn only_who_says_nothing_is_silent() {
        let dead: Vec<Heard> = (0..21).map(|at| heard(304 + at * 1000, true)).collect();
        assert_eq!(owed(&dead), 20);
        let idle_before: Vec<Heard> = (0..5).map(|at| heard(3_600_000 + at * 1000, true)).collect();
        assert_eq!(owed(&idle_before), 4, "what was not asked is not owed");
        let answers: Vec<Heard> = (0..50).map(|_| heard(12, true)).collect();
        assert_eq!(owed(&answers), 0, "it has something to answer at every look, and answers");
        // A closed window is asked for rarely in the end. At two looks the question is just on its way.
        let mut closed: Vec<Heard> = (0..120).map(|at| heard(at * 1000, at == 0)).collect();
        closed.push(heard(120_000, true));
        assert_eq!(owed(&closed), 0);
        let late = [heard(500, true), heard(1500, true), heard(300, true), heard(1300, true)];
        assert_eq!(owed(&late), 1, "it was answered in between, and owes again");
        assert_eq!(owed(&[heard(500, true), heard(1500, true), heard(200, false)]), 0);
    }
    #[test]
    fn who_has_room_and_gets_nothing_cannot_be_reached() {
        // It is heard: it sends again what it gets no acknowledgement for.
        let taken = |taken| Heard { taken, ..heard(12, false) };
        let cut: Vec<Heard> = (0..21).map(|_| taken(Some(7))).collect();
        assert_eq!(owed(&cut), 20);
        let slow: Vec<Heard> = (0..40).map(|at| taken(Some(at / 5))).collect();
        assert_eq!(owed(&slow), 4, "little comes through, and it does");
        let full: Vec<Heard> = (0..40).map(|at| taken((at % 10 > 0).then_some(7))).collect();
        assert_eq!(owed(&full), 8, "it had no room in between");
    }
}
