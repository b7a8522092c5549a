//! Whether a disk's image is where it was, asked of a file system that may stand still.
//!
//! Invariants: nobody waits for that longer than [`LOOK_TIME`]; of one disk there is one look at a time, so a file system
//! that stands still costs one thread for each disk on it, however often somebody asks.

use std::{sync::Arc, time::Duration};

use backtide_control::ApiError;
use tokio::sync::Mutex;

use super::waiting;
use crate::disk::{Displaced, InPlace};

/// How long a file system may take to tell.
const LOOK_TIME: Duration = Duration::from_secs(10);

/// The place of an attached disk's image.
#[derive(Clone)]
pub(super) struct Place {
    image: InPlace,
    turn: Turn,
}

/// What was seen.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// The file that is open.
    InPlace,
    /// Something else.
    Displaced(Displaced),
    /// Nothing: the file system does not answer.
    StandsStill,
}

impl Place {
    pub(super) fn new(image: InPlace) -> Self {
        Self { image, turn: Turn::default() }
    }

    /// The image, for whoever looks once more when nobody else can.
    pub(super) fn into_image(self) -> InPlace {
        self.image
    }

    /// Looks, for at most [`LOOK_TIME`].
    pub(super) async fn look(&self) -> Result<Seen, ApiError> {
        let image = self.image.clone();
        let looked = self.turn.within(LOOK_TIME, move || image.look()).await?;
        Ok(match looked {
            Some(Ok(_)) => Seen::InPlace,
            Some(Err(displaced)) => Seen::Displaced(displaced),
            None => Seen::StandsStill,
        })
    }
}

/// Held by who looks, until the file system has answered.
#[derive(Clone, Default)]
struct Turn(Arc<Mutex<()>>);

impl Turn {
    /// What `look` tells; none when it, or one before it, takes longer. It goes on then, and has its turn.
    async fn within<T: Send + 'static>(
        &self,
        time: Duration,
        look: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Option<T>, ApiError> {
        let looking = async {
            let turn = Arc::clone(&self.0).lock_owned().await;
            let look = move || {
                let _turn = turn;
                look()
            };
            waiting(look).await
        };
        tokio::time::timeout(time, looking).await.ok().transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    use super::*;

    #[tokio::test]
    async fn a_file_system_that_stands_still_is_not_waited_for_and_costs_one_thread() {
        let (turn, looks) = (Turn::default(), Arc::new(AtomicUsize::new(0)));
        let (answer, answered) = mpsc::channel::<()>();
        let stuck = {
            let looks = Arc::clone(&looks);
            move || {
                looks.fetch_add(1, Ordering::SeqCst);
                // Ends with the test at the latest.
                let _ = answered.recv();
            }
        };
        let short = Duration::from_millis(20);
        assert_eq!(turn.within(short, stuck).await.unwrap(), None, "it has not answered");
        for _ in 0..3 {
            let looks = Arc::clone(&looks);
            let another = move || {
                looks.fetch_add(1, Ordering::SeqCst);
            };
            assert_eq!(turn.within(short, another).await.unwrap(), None);
        }
        assert!(looks.load(Ordering::SeqCst) <= 1, "one look of a disk at a time");
        let other = Turn::default();
        assert_eq!(other.within(Duration::from_secs(60), || 7).await.unwrap(), Some(7), "alone with it");
        drop(answer);
        assert_eq!(turn.within(Duration::from_secs(60), || 8).await.unwrap(), Some(8), "it goes on");
    }
}
