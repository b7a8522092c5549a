//! `kill -9` between two steps: of attach, activity log, snapshot, pass and detach in the agent, of segment,
//! sync, seal and mark in the receiver. Afterwards nothing is forgotten, and every point is the model.
//!
//! Every kill point of a debug build is reached once; `BACKTIDE_KILL_ROUNDS=n` goes through all of them n
//! times: those that come often some occurrences later each time, which may be more than there are.

use backtide_e2e::{Bench, Disk, Doomed, Load, Model, kill_rounds};
use backtide_storage::KillPoint;

const SIZE: u64 = 4 << 20;

/// Extents go cold all the time.
const OPTIONS: [&str; 4] = ["--activity-extents", "4", "--activity-extent-size", "64KiB"];

/// Exit code of a command whose daemon is not there.
const UNREACHABLE: i32 = 6;

/// Whose story comes to a kill point.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Agent,
    Receiver,
    /// Stories of their own come to these.
    Elsewhere,
}

/// How often a daemon comes to it.
#[derive(Clone, Copy, PartialEq)]
enum Comes {
    /// Once in its life, or in a part of the story that happens once.
    Once,
    /// Again and again.
    Often,
}

fn place(point: KillPoint) -> (Side, Comes) {
    match point {
        KillPoint::AttachOpened
        | KillPoint::AttachTracking
        | KillPoint::AttachRecord
        | KillPoint::AttachServed
        | KillPoint::PassFrozen
        | KillPoint::PassBeginSent
        | KillPoint::PassEndSent
        | KillPoint::PassDurable
        | KillPoint::DetachQuiet
        | KillPoint::DetachFlushed
        | KillPoint::DetachUnlocked
        | KillPoint::DetachTracking
        | KillPoint::DetachRecord => (Side::Agent, Comes::Once),
        KillPoint::ActivityWritten
        | KillPoint::ActivityDurable
        | KillPoint::SnapshotWritten
        | KillPoint::SnapshotDurable
        | KillPoint::FileBeside
        | KillPoint::FileRenamed
        | KillPoint::PassRead
        | KillPoint::PassDataSent => (Side::Agent, Comes::Often),
        KillPoint::ClaimAppended | KillPoint::PassEndDurable => (Side::Receiver, Comes::Once),
        KillPoint::SegmentCreated
        | KillPoint::SegmentBegun
        | KillPoint::EntryAppended
        | KillPoint::EntriesWritten
        | KillPoint::SpareMade
        | KillPoint::FooterWritten
        | KillPoint::LogSynced
        | KillPoint::MarkWritten => (Side::Receiver, Comes::Often),
        KillPoint::RewindDetached
        | KillPoint::TakenOver
        | KillPoint::HydrationMade
        | KillPoint::TakenTracking
        | KillPoint::HydrationStored
        | KillPoint::HydrationNoted
        | KillPoint::HydrationFinished
        | KillPoint::ForgetNoted
        | KillPoint::ForgetRemoved => (Side::Elsewhere, Comes::Often),
    }
}

/// Where somebody dies.
struct Death {
    point: KillPoint,
    /// At which occurrence of it.
    times: u64,
    /// Whether it has so many, whatever the chances.
    must_come: bool,
}

/// Every point of a side.
fn deaths(of: Side) -> impl Iterator<Item = Death> {
    let once = move |round| {
        let points = KillPoint::ALL.iter().copied().filter(move |point| place(*point).0 == of);
        // Of an attach the first file is that of the tracking, the second the record.
        let second = [KillPoint::FileBeside, KillPoint::FileRenamed];
        let second = second.into_iter().filter(move |_| of == Side::Agent && round == 0);
        let second = second.map(|point| Death { point, times: 2, must_come: true });
        let death = move |point| {
            let rare = place(point).1 == Comes::Once;
            let times = if rare { 1 } else { 1 + round * 7 % 20 };
            Death { point, times, must_come: rare || round == 0 }
        };
        points.map(death).chain(second)
    };
    (0..kill_rounds(1)).flat_map(once)
}

/// What a guest did over many lives of the daemons.
struct Story<'bench> {
    bench: &'bench Bench,
    disk: Disk<'bench>,
    uri: String,
    model: Model,
    loads: u64,
}

impl<'bench> Story<'bench> {
    fn begin(bench: &'bench Bench) -> Self {
        bench.image("vm1.img", SIZE);
        let disk = bench.attach("vm1", "vm1.img", &OPTIONS);
        disk.wait("sync");
        Self { bench, uri: disk.uri(), disk, model: Model::of_zeroes(SIZE, Vec::new()), loads: 0 }
    }

    /// A guest, if the disk is served at this moment.
    fn guest(&mut self) -> Option<Load> {
        self.loads += 1;
        Load::try_start(&self.uri, self.loads)
    }

    /// Does everything that brings an agent to its kill point, until it is dead; whether it died.
    fn until_dead(&mut self, agent: &mut Doomed) -> bool {
        while !agent.is_dead() && ![0, 3].contains(&self.bench.run(&["status"]).code) {}
        let steps = [
            |story: &mut Self| story.write(40),
            |story: &mut Self| story.resync_under_load(),
            |story: &mut Self| story.detach(),
        ];
        for step in steps {
            if agent.is_dead() {
                return true;
            }
            step(self);
        }
        self.bench.run(&["status"]).code == UNREACHABLE && agent.died()
    }

    fn write(&mut self, count: u64) {
        let Some(load) = self.guest() else { return };
        load.goes_on_or_breaks(count);
        self.model.then(load.end());
    }

    fn resync_under_load(&mut self) {
        let load = self.guest();
        self.quietly(&["resync", "vm1", "--full"]);
        if let Some(load) = load {
            load.goes_on_or_breaks(40);
            self.model.then(load.end());
        }
        // Ends with the agent too.
        self.quietly(&["wait", "vm1", "--for", "sync"]);
    }

    /// As soon as the last guest's connection is seen to have ended.
    fn detach(&self) {
        while self.bench.run(&["detach", "vm1"]).code == 5 {}
    }

    /// Somebody may die meanwhile.
    fn quietly(&self, arguments: &[&str]) {
        self.bench.run(arguments);
    }

    /// A sound agent finds everything that differs, and what the receiver offers is what was.
    fn is_well(&self, point: KillPoint, round: usize) {
        let name = point.name();
        if self.bench.run(&["status", "vm1"]).code == 4 {
            self.bench.attach("vm1", "vm1.img", &OPTIONS);
        }
        // Connects at once, and not when its patience with a dying receiver ends.
        self.quietly(&["resume", "vm1"]);
        self.disk.settle();
        let found = self.bench.json(&["verify", "vm1"]);
        assert_eq!(found["differing_count"], 0, "after a death at {name}: {found}");
        println!("after a death at {name}");
        self.disk.timeline_holds(round as u64, 3, &self.model);
    }

    fn points_are_the_model(&self) {
        self.disk.latest_is_the_image();
        let image = std::path::Path::new(&self.disk.image);
        self.model.assert_is_in(image, self.model.len(), "the image");
        self.disk.points_are_prefixes(&self.disk.offered_points(10), &self.model);
    }
}

#[test]
fn an_agent_that_dies_between_any_two_steps_forgets_nothing() {
    let bench = Bench::new();
    let (_receiver, mut agent) = (bench.receiver(), bench.agent());
    let mut story = Story::begin(&bench);
    for (number, Death { point, times, must_come }) in deaths(Side::Agent).enumerate() {
        // The last one ended in one way or the other, too.
        if number % 2 == 0 {
            assert_eq!(agent.stop(), 0)
        } else {
            agent.kill()
        }
        let mut doomed = bench.doomed(&["agent", "run"], &format!("{}:{times}", point.name()));
        let died = story.until_dead(&mut doomed);
        assert!(died || !must_come, "{} is never reached", point.name());
        doomed.kill();
        agent = bench.agent();
        story.is_well(point, number);
    }
    story.points_are_the_model();
}

#[test]
fn a_receiver_that_dies_between_any_two_steps_keeps_what_it_acknowledged() {
    let bench = Bench::new();
    let configuration = format!(
        "store = \"{}\"\nrun = \"{}\"\n[limits]\nsegment_bytes = 262144\n",
        bench.name("store"),
        bench.name("")
    );
    let (mut receiver, _agent) = (bench.receiver_with(&configuration), bench.agent());
    let mut story = Story::begin(&bench);
    for (number, Death { point, times, must_come }) in deaths(Side::Receiver).enumerate() {
        if number % 2 == 0 {
            assert_eq!(receiver.stop(), 0)
        } else {
            receiver.kill()
        }
        let configuration = bench.name("receiver.toml");
        let arguments = ["receiver", "run", "--config", &configuration];
        let mut doomed = bench.doomed(&arguments, &format!("{}:{times}", point.name()));
        let load = story.guest().expect("the disk is served");
        let new = format!("new{number}");
        if point == KillPoint::ClaimAppended {
            a_disk_comes_and_goes(&bench, &mut doomed, &new);
        }
        if point == KillPoint::PassEndDurable {
            story.quietly(&["resync", "vm1", "--full"]);
        }
        let died = until_receiver_dies(&bench, &mut doomed, &load);
        story.model.then(load.stop());
        assert!(died || !must_come, "{} is never reached", point.name());
        doomed.kill();
        receiver = bench.daemon(&arguments);
        story.is_well(point, number);
    }
    story.points_are_the_model();
}

#[test]
fn the_t_of_a_pass_whose_end_was_durable_and_not_heard_of_is_a_point() {
    let bench = Bench::new();
    let (receiver, mut agent) = (bench.receiver(), bench.agent());
    agent.may_complain("the stream broke");
    let mut story = Story::begin(&bench);
    story.write(40);
    assert_eq!(receiver.stop(), 0);
    let mut doomed = bench.doomed(&["receiver", "run"], KillPoint::PassEndDurable.name());
    story.quietly(&["resume", "vm1"]);
    story.disk.wait("sync");
    // Slowly, so that its beginning is seen.
    bench.json(&["limits", "vm1", "--resync-rate", "2MiB"]);
    let load = story.guest().expect("the disk is served");
    load.goes_on(20);
    let aborted =
        |status: &serde_json::Value| status["counters"]["passes_aborted"].as_u64().expect("a count");
    let before = aborted(&story.disk.status());
    bench.json(&["resync", "vm1", "--full"]);
    let begun = story.disk.until("a pass", |status| status["resync"]["at"].is_u64());
    let at = begun["resync"]["at"].as_u64().expect("an LSN");
    assert!(doomed.died());
    story.disk.until("the agent knows", |status| status["connected"] == false);
    load.goes_on(20);
    story.model.then(load.stop());
    assert_eq!(aborted(&story.disk.status()), before + 1, "the agent has not heard of its end");
    bench.json(&["limits", "vm1", "--resync-rate", "0"]);

    let _receiver = bench.receiver();
    story.is_well(KillPoint::PassEndDurable, 0);
    assert_eq!(story.disk.points_are_prefixes(&[at], &story.model).len(), 1);
    story.points_are_the_model();
}

/// A disk that is new to the receiver.
fn a_disk_comes_and_goes(bench: &Bench, receiver: &mut Doomed, name: &str) {
    bench.image(name, 1 << 20);
    let stream = bench.socket("stream.sock");
    bench.run(&["attach", name, &bench.name(name), "--receiver", &stream]);
    while !receiver.is_dead() && bench.run(&["wait", name, "--for", "sync", "--timeout", "100ms"]).code != 0 {
        bench.run(&["resume", name]);
    }
    bench.run(&["detach", name]);
}

/// The guest writes on until some segments must be full.
fn until_receiver_dies(bench: &Bench, receiver: &mut Doomed, load: &Load) -> bool {
    for _ in 0..3 {
        load.goes_on(30);
        while bench.run(&["wait", "vm1", "--for", "durable", "--timeout", "100ms"]).code != 0 {
            if receiver.is_dead() {
                return true;
            }
            bench.run(&["resume", "vm1"]);
        }
    }
    bench.run(&["points", "vm1"]).code == UNREACHABLE && receiver.died()
}
