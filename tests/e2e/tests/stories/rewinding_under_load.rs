//! A rewind beneath a guest that goes on writing, and at a random moment of it agent, receiver or both die: afterwards the
//! disk is what it would have been without, or the point, each with everything the guest was acknowledged since; the rewind
//! can be undone, and every point of before and after is there.
//!
//! `BACKTIDE_KILL_ROUNDS=100` is as many moments, `SEED=` the same again as far as time repeats itself.

use std::{
    io::Read,
    ops::RangeInclusive,
    path::Path,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use backtide_e2e::{Bench, Daemon, Disk, Model, Returning, Written, http, kill_rounds, ledger::seed};
use serde_json::{Value, json};

const SIZE: u64 = 8 << 20;

/// Between its writes everything is durable: there are moments to go back from.
const OPTIONS: [&str; 2] = ["--ack", "durable-every-write"];

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Agent,
    Receiver,
    Both,
}

/// How long a rewind took that nobody died of.
#[derive(Clone, Copy)]
struct Took {
    /// Until it was answered.
    answered: Duration,
    /// Until nothing was missing any more.
    whole: Duration,
}

/// What became of one that somebody may have died of.
enum Outcome {
    AsItWas,
    /// After what the guest did on its first connections, so many.
    SetBackAfter(usize),
}

struct Story<'bench> {
    bench: &'bench Bench,
    disk: Disk<'bench>,
    uri: String,
    model: Model,
    /// Of the guests' writes: ascending.
    next_seed: u64,
    random: u64,
    /// Everything that was a point once.
    points: Vec<(u64, Model)>,
    receiver: Option<Daemon>,
    agent: Option<Daemon>,
}

impl Story<'_> {
    fn random(&mut self) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.random >> 33
    }

    /// Somewhere in `span`.
    fn moment(&mut self, span: Duration) -> Duration {
        let micros = u64::try_from(span.as_micros()).expect("a short time");
        Duration::from_micros(self.random() % micros)
    }

    /// Kills, and starts again who was killed.
    fn kill(&mut self, victim: Victim) {
        if victim != Victim::Agent {
            self.receiver.take().expect("it runs").kill();
        }
        if victim != Victim::Receiver {
            self.agent.take().expect("it runs").kill();
        }
        self.receiver.get_or_insert_with(|| self.bench.receiver());
        self.agent.get_or_insert_with(|| self.bench.agent());
    }

    /// A rewind, undone when it was one.
    fn round(&mut self, death: Option<(Duration, Victim)>) -> (Took, bool) {
        self.disk.guest_writes(&mut self.model, self.next_seed, 60);
        let (early, at_early) = (self.disk.last(), self.model.clone());
        self.points.push((early, at_early.clone()));
        let guest = Returning::start(&self.uri, self.next_seed + 1);
        guest.goes_on(40);

        let began = Instant::now();
        let rewind = self.begin_rewind(early);
        if let Some((moment, victim)) = death {
            std::thread::sleep(moment);
            self.kill(victim);
        }
        let answer = rewind.join().expect("a thread");
        let answered = began.elapsed();
        guest.goes_on(40);
        let lives = guest.stop();
        self.next_seed += 2 + lives.len() as u64;
        self.disk.whole();
        let took = Took { answered, whole: began.elapsed() };

        self.disk.latest_is_the_image();
        assert_eq!(self.bench.json(&["verify", "vm1"])["differing_count"], 0);
        let set_back = match self.outcome(&at_early, &lives) {
            Outcome::AsItWas => {
                assert!(answer.is_none(), "it said that it had set the disk back: {answer:?}");
                self.model = self.model.after_all(&lives);
                false
            }
            Outcome::SetBackAfter(before) => {
                let at_late = self.model.after_all(&lives[..before]);
                // Each write has the LSN after the one before, as long as the agent lives.
                let answered: usize = lives[..before].iter().map(|life| life.writes.len()).sum();
                let first = early + answered as u64;
                self.undo(first..=first + before as u64, at_late, answer.as_ref());
                true
            }
        };
        (took, set_back)
    }

    /// The report of a rewind of a disk with clients, when there is one.
    fn begin_rewind(&self, to: u64) -> JoinHandle<Option<Value>> {
        let body = json!({ "to": to, "reconnect": true });
        let mut asking =
            http::ask(&self.bench.path("agent.sock"), "POST", "/v1/disks/vm1/rewind", Some(&body));
        std::thread::spawn(move || {
            let mut text = String::new();
            // An answer or none.
            let _ = asking.read_to_string(&mut text);
            let (head, body) = text.split_once("\r\n\r\n")?;
            head.starts_with("HTTP/1.1 200").then(|| serde_json::from_str(body).ok()).flatten()
        })
    }

    /// What the guest did on its last connection came after it all, and counts whatever happened.
    fn outcome(&self, at_early: &Model, lives: &[Written]) -> Outcome {
        let image = Path::new(&self.disk.image);
        let look = |model: Model| model.look_for_it_in(image, model.len());
        let Err(as_it_was) = look(self.model.after_all(lives)) else { return Outcome::AsItWas };
        let mut whys = vec![as_it_was];
        for before in 1..lives.len() {
            match look(at_early.after_all(&lives[before..])) {
                Ok(()) => return Outcome::SetBackAfter(before),
                Err(why) => whys.push(why),
            }
        }
        panic!("the disk is neither what it was nor the point: {whys:#?}");
    }

    /// Sets the disk to the moment before the rewind, which is at one of the LSNs `around`.
    fn undo(&mut self, around: RangeInclusive<u64>, at_late: Model, report: Option<&Value>) {
        let is_it = |lsn: &u64| {
            let (at, output) = (format!("lsn:{lsn}"), self.bench.name("before.img"));
            // What comes after it may be a hole.
            let restored = self.bench.run(&["restore", "vm1", "--at", &at, "--output", &output, "--force"]);
            restored.code == 0 && at_late.look_for_it_in(Path::new(&output), at_late.len()).is_ok()
        };
        // A write that was not answered may have been done, and may not.
        let before = around.clone().rev().find(is_it);
        let before = before.unwrap_or_else(|| panic!("what was before is gone: {}", self.disk.points()));
        if let Some(report) = report {
            assert_eq!(report["from"], before, "{report}");
        }
        self.disk.rewind(before);
        self.disk.whole();
        self.disk.latest_is_the_image();
        at_late.assert_is_in(Path::new(&self.disk.image), at_late.len(), "the disk of before the rewind");
        self.points.push((before, at_late.clone()));
        self.model = at_late;
    }
}

#[test]
fn kills_at_any_moment_of_a_rewind_under_load_leave_one_disk_or_the_other_and_all_of_its_history() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &OPTIONS);
    let mut story = Story {
        bench: &bench,
        uri: disk.uri(),
        disk,
        model: Model::of_zeroes(SIZE, Vec::new()),
        next_seed: 1,
        random: seed(),
        points: Vec::new(),
        receiver: Some(receiver),
        agent: Some(agent),
    };
    let (whole, set_back) = story.round(None);
    assert!(set_back, "nobody died of it");
    for round in 0..kill_rounds(6) {
        let victim = [Victim::Agent, Victim::Receiver, Victim::Both][(round % 3) as usize];
        // While it is asked for, and until nothing is missing any more and somewhat later.
        let span = if round % 2 == 0 { whole.answered } else { whole.whole * 6 / 5 };
        let moment = story.moment(span);
        let (_, set_back) = story.round(Some((moment, victim)));
        println!("round {round}: {victim:?} died after {moment:?} of {span:?}; set back: {set_back}");
    }
    for (lsn, model) in &story.points {
        let at = format!("lsn:{lsn}");
        let restored = story.disk.restore(&at);
        model.assert_is_in(&restored, model.len(), &at);
        std::fs::remove_file(restored).unwrap();
    }
}
