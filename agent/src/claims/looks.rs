//! Looks at what lies on other storage than an image: such storage may never answer, and is none of the image's trouble.
//!
//! Invariants: each look has a thread of its own, and nobody waits for them longer than his patience; there is one look at
//! a thing at a time, and one that was given up is not waited for again before it has ended. So what stands still costs
//! one thread and one wait, however often somebody asks.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

/// How long what lies elsewhere may take to answer.
pub(super) const LOOK_TIME: Duration = Duration::from_secs(1);

/// All looks under way.
#[derive(Clone, Debug, Default)]
pub(super) struct Looks(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    under_way: Mutex<BTreeMap<PathBuf, Waits>>,
    ended: Condvar,
}

/// Who waits for a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    /// Whoever began it, and perhaps others.
    Somebody,
    /// Nobody any more.
    Nobody,
}

/// A look at something, until it has ended.
struct Turn {
    looks: Looks,
    at: PathBuf,
}

impl Looks {
    /// What `look` tells of each of `things`, in the order of where they are; without those that take longer than `patience`, of which the log
    /// tells once.
    pub(super) fn at_each<T, F>(&self, things: Vec<PathBuf>, patience: Duration, look: F) -> Vec<T>
    where
        T: Send + 'static,
        F: Fn(&Path) -> T + Clone + Send + 'static,
    {
        let until = Instant::now() + patience;
        let (answer, answers) = mpsc::channel();
        let (mut begun, mut waiting) = (Vec::new(), things);
        loop {
            for turn in self.turns(&mut waiting) {
                begun.push(turn.at.clone());
                let (look, answer) = (look.clone(), answer.clone());
                let looking = move || {
                    let at = turn.at.clone();
                    let found = look(&at);
                    drop(turn);
                    // Whoever asked may have given it up.
                    let _ = answer.send((at, found));
                };
                // Without a thread nothing is known.
                let _ = thread::Builder::new().name("look".to_owned()).spawn(looking);
            }
            if waiting.is_empty() || !self.wait(&waiting, until) {
                break;
            }
        }
        drop(answer);
        let mut found = BTreeMap::new();
        while let Ok((at, what)) = answers.recv_timeout(until.saturating_duration_since(Instant::now())) {
            begun.retain(|other| *other != at);
            found.insert(at, what);
        }
        self.give_up(&begun);
        found.into_values().collect()
    }

    /// Begins with those that nobody else looks at, and takes them out; those that stand still too.
    fn turns(&self, waiting: &mut Vec<PathBuf>) -> Vec<Turn> {
        let mut under_way = self.under_way();
        let mut turns = Vec::new();
        waiting.retain(|at| match under_way.get(at) {
            Some(Waits::Somebody) => true,
            Some(Waits::Nobody) => false,
            None => {
                under_way.insert(at.clone(), Waits::Somebody);
                turns.push(Turn { looks: self.clone(), at: at.clone() });
                false
            }
        });
        turns
    }

    /// Waits until a look at one of them has ended or was given up; whether that is so.
    fn wait(&self, waiting: &[PathBuf], until: Instant) -> bool {
        let all_go_on = |under_way: &mut BTreeMap<PathBuf, Waits>| {
            waiting.iter().all(|at| under_way.get(at) == Some(&Waits::Somebody))
        };
        let time = until.saturating_duration_since(Instant::now());
        let waited = self.0.ended.wait_timeout_while(self.under_way(), time, all_go_on);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Waits for these no more.
    fn give_up(&self, stuck: &[PathBuf]) {
        for at in stuck {
            if let Some(waits) = self.under_way().get_mut(at) {
                *waits = Waits::Nobody;
                tracing::warn!(
                    "{} does not answer: its storage stands still, and what it has of an image is not known",
                    at.display()
                );
            }
        }
        self.0.ended.notify_all();
    }

    fn under_way(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Waits>> {
        self.0.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.looks.under_way().remove(&self.at);
        self.looks.0.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn what_stands_still_is_waited_for_once_and_holds_up_nothing_else() {
        let (looks, begun) = (Looks::default(), Arc::<AtomicUsize>::default());
        let (free, until_free) = mpsc::channel::<()>();
        let until_free = Arc::new(Mutex::new(until_free));
        let look = {
            let begun = Arc::clone(&begun);
            move |at: &Path| {
                if at == Path::new("stuck") {
                    begun.fetch_add(1, Ordering::SeqCst);
                    // Ends with the test at the latest.
                    let _ = until_free.lock().unwrap().recv();
                }
                at.to_owned()
            }
        };
        let [stuck, well] = ["stuck", "well"].map(PathBuf::from);
        let nothing: [PathBuf; 0] = [];
        assert_eq!(looks.at_each(vec![stuck.clone()], Duration::from_millis(20), look.clone()), nothing);
        for _ in 0..3 {
            let found = looks.at_each(vec![stuck.clone(), well.clone()], LONG, look.clone());
            assert_eq!(found, [PathBuf::from("well")], "nobody waits for it again");
        }
        assert_eq!(begun.load(Ordering::SeqCst), 1, "one look at a time");
        drop(free);
        while !looks.under_way().is_empty() {
            thread::yield_now();
        }
        assert_eq!(looks.at_each(vec![stuck.clone()], LONG, look), [stuck], "it answers again");
    }

    #[test]
    fn a_look_of_somebody_else_is_waited_for() {
        let looks = Looks::default();
        let at = PathBuf::from("busy");
        let [turn] = <[Turn; 1]>::try_from(looks.turns(&mut vec![at.clone()])).ok().unwrap();
        let asking = {
            let (looks, at) = (looks.clone(), at.clone());
            thread::spawn(move || looks.at_each(vec![at], LONG, Path::to_owned))
        };
        thread::yield_now();
        drop(turn);
        assert_eq!(asking.join().unwrap(), [at]);
    }
}
