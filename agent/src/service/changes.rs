//! Changes of the agent's disks, each carried to its end, also when whoever asked for it goes away meanwhile.
//!
//! A receiver or storage may hold one up for longer than a call waits. Whoever asked then hears so, and can follow it.
//! Invariants: nothing is begun twice by following; how many changes are kept to be followed is bounded, and those that go on
//! are kept rather than those that have ended.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use backtide_agent_api::GoesOn;
use backtide_control::{ApiError, ErrorCode};
use serde::Serialize;
use serde_json::Value;
use tokio::{
    sync::watch,
    task::{JoinError, JoinHandle},
    time::{Instant, timeout},
};
use uuid::Uuid;

/// How long whoever asks for a change waits for it. Storage that stands still may hold it up for ever.
const CHANGE_TIME: Duration = Duration::from_secs(50);

/// Changes that can be followed.
const SLOW_MAX: usize = 64;

/// The changes that took longer than their askers waited.
#[derive(Default)]
pub(super) struct Changes {
    slow: Mutex<VecDeque<Slow>>,
}

#[derive(Clone)]
struct Slow {
    id: Uuid,
    began: Instant,
    /// The answer that the call would have had, once there is one.
    ended: watch::Receiver<Option<Answer>>,
}

type Answer = Result<Value, ApiError>;

impl Changes {
    /// Carries a change to its end.
    ///
    /// # Errors
    /// The change's own, or `busy` with [`GoesOn`] when it takes longer than whoever asks waits.
    pub(super) async fn to_its_end<T: Serialize + Send + 'static>(
        &self,
        change: impl Future<Output = Result<T, ApiError>> + Send + 'static,
    ) -> Result<T, ApiError> {
        let began = Instant::now();
        let mut going_on = tokio::spawn(change);
        match timeout(CHANGE_TIME, &mut going_on).await {
            Ok(ended) => ended.unwrap_or_else(|error| Err(lost(&error))),
            Err(_) => Err(self.keep(began, going_on).goes_on()),
        }
    }

    /// Follows a change that goes on: the answer it was asked for. An answer stays for whoever asks once more.
    ///
    /// # Errors
    /// The change's own, `busy` with [`GoesOn`] when it goes on for longer still, `not-found` when it is not known.
    pub(super) async fn follow(&self, id: &str) -> Answer {
        let slow = self.find(id).ok_or_else(|| {
            let message = format!("there is no change {id} at this agent, or none any more");
            ApiError::new(ErrorCode::NotFound, message)
                .with_hint("the disk's status says what became of it; an agent that was started since knows of no changes before")
        })?;
        let mut ended = slow.ended.clone();
        match timeout(CHANGE_TIME, ended.wait_for(Option::is_some)).await {
            Ok(Ok(answer)) => answer.clone().expect("it was waited for"),
            Ok(Err(_)) => Err(ApiError::new(ErrorCode::Failed, "the change has ended without an answer")),
            Err(_) => Err(slow.goes_on()),
        }
    }

    fn find(&self, id: &str) -> Option<Slow> {
        let known = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|slow| slow.id.to_string() == id).cloned()
    }

    fn keep<T: Serialize + Send + 'static>(
        &self,
        began: Instant,
        going_on: JoinHandle<Result<T, ApiError>>,
    ) -> Slow {
        let (told, ended) = watch::channel(None);
        tokio::spawn(async move {
            let answer = going_on.await.unwrap_or_else(|error| Err(lost(&error)));
            let answer = answer.and_then(|answer| {
                serde_json::to_value(answer).map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))
            });
            told.send_replace(Some(answer));
        });
        let slow = Slow { id: Uuid::new_v4(), began, ended };
        let mut known = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= SLOW_MAX {
            let ended = known.iter().position(|slow| slow.ended.borrow().is_some());
            known.remove(ended.unwrap_or(0));
        }
        known.push_back(slow.clone());
        slow
    }
}

impl Slow {
    fn goes_on(&self) -> ApiError {
        GoesOn { change: self.id.to_string(), seconds: self.began.elapsed().as_secs() }.answer()
    }
}

fn lost(error: &JoinError) -> ApiError {
    ApiError::from_error(ErrorCode::Failed, error)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    fn change_of(error: &ApiError) -> String {
        GoesOn::of(error).unwrap_or_else(|| panic!("{error}")).change
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_that_takes_long_is_followed_to_its_end_and_begun_once() {
        let (changes, begun) = (Changes::default(), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&begun);
        let slow = async move {
            counted.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(CHANGE_TIME * 2 + Duration::from_secs(20)).await;
            Ok("back")
        };
        let first = changes.to_its_end(slow).await.unwrap_err();
        assert_eq!((first.code, GoesOn::of(&first).unwrap().seconds), (ErrorCode::Busy, 50));
        let second = changes.follow(&change_of(&first)).await.unwrap_err();
        let goes_on = GoesOn::of(&second).unwrap();
        assert_eq!((goes_on.change, goes_on.seconds), (change_of(&first), 100));
        for _ in 0..2 {
            assert_eq!(changes.follow(&change_of(&first)).await.unwrap(), "back");
        }
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        let unknown = changes.follow("7e1c0d0e-41a5-4d5c-9a4f-3a6f0a52a0b1").await.unwrap_err();
        assert_eq!(unknown.code, ErrorCode::NotFound);
    }

    #[tokio::test(start_paused = true)]
    async fn its_error_and_its_end_without_any_are_told_too() {
        let changes = Changes::default();
        let later = CHANGE_TIME + Duration::from_secs(1);
        let refused = async move {
            tokio::time::sleep(later).await;
            Err::<(), _>(ApiError::new(ErrorCode::Fenced, "another agent has it"))
        };
        let busy = changes.to_its_end(refused).await.unwrap_err();
        let error = changes.follow(&change_of(&busy)).await.unwrap_err();
        assert_eq!((error.code, error.message.as_str()), (ErrorCode::Fenced, "another agent has it"));
        let quick = changes.to_its_end(async { Err::<(), _>(error) }).await.unwrap_err();
        assert_eq!(quick.code, ErrorCode::Fenced);
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_go_on_are_kept_and_their_number_is_bounded() {
        let changes = Changes::default();
        let first = changes.to_its_end(std::future::pending::<Result<(), _>>()).await.unwrap_err();
        let mut last = String::new();
        for _ in 0..SLOW_MAX * 2 {
            let slow = async {
                tokio::time::sleep(CHANGE_TIME + Duration::from_secs(1)).await;
                Ok(())
            };
            last = change_of(&changes.to_its_end(slow).await.unwrap_err());
            changes.follow(&last).await.unwrap();
        }
        assert_eq!(changes.slow.lock().unwrap().len(), SLOW_MAX);
        assert_eq!(changes.follow(&change_of(&first)).await.unwrap_err().code, ErrorCode::Busy);
        changes.follow(&last).await.unwrap();
    }
}
