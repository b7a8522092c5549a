//! One attached disk, as its owner sees it through the command.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::{Bench, Load, Model, Said, bench::text, http, load::Random, tools};

/// An attached disk.
#[derive(Clone)]
pub struct Disk<'bench> {
    bench: &'bench Bench,
    /// Its name.
    pub name: String,
    /// The image behind it, or its URI.
    pub image: String,
}

impl<'bench> Disk<'bench> {
    pub(crate) fn new(bench: &'bench Bench, name: &str, image: &str) -> Self {
        Self { bench, name: name.to_owned(), image: image.to_owned() }
    }

    /// Its status, whether it is all right or not.
    pub fn status(&self) -> Value {
        let said = self.bench.run(&["status", &self.name]);
        assert!([0, 3].contains(&said.code), "{said:?}");
        let status: Value = serde_json::from_str(&said.stdout).expect("a status is JSON");
        status["disks"][0].clone()
    }

    /// Where it is served.
    pub fn uri(&self) -> String {
        self.status()["nbd_uri"].as_str().expect("a disk has a URI").to_owned()
    }

    /// The LSN of its last write.
    pub fn last(&self) -> u64 {
        self.status()["lsn"]["last"].as_u64().expect("an LSN")
    }

    /// Waits with `backtide wait --for`.
    pub fn wait(&self, state: &str) {
        self.bench.json(&["wait", &self.name, "--for", state]);
    }

    /// Waits until everything written so far can be gone back to.
    pub fn settle(&self) {
        self.wait("sync");
        self.wait("durable");
    }

    /// Waits until it lacks nothing and the receiver has everything.
    pub fn whole(&self) {
        self.settle();
        self.until("whole", |status| status["hydration"].is_null());
        self.settle();
    }

    /// Sets it back to this LSN; gives the report.
    pub fn rewind(&self, to: u64) -> Value {
        http::call(&self.bench.path("agent.sock"), "POST", &self.rewinds(), Some(&json!({ "to": to })))
    }

    /// The same with an agent that may die of it.
    pub fn rewind_or_die(&self, to: u64) {
        let (agent, body) = (self.bench.path("agent.sock"), json!({ "to": to }));
        let mut asking = http::ask(&agent, "POST", &self.rewinds(), Some(&body));
        // An answer or none.
        let _ = asking.read_to_end(&mut Vec::new());
    }

    fn rewinds(&self) -> String {
        format!("/v1/disks/{}/rewind", self.name)
    }

    /// A guest that writes, and goes; what it did is in the model, and at the receiver.
    pub fn guest_writes(&self, model: &mut Model, seed: u64, count: u64) {
        let load = self.load(seed);
        load.goes_on(count);
        model.then(load.stop());
        self.settle();
    }

    /// Waits until its status is as asked for, and gives that.
    pub fn until(&self, what: &str, reached: impl Fn(&Value) -> bool) -> Value {
        loop {
            let status = self.status();
            if reached(&status) {
                return status;
            }
            assert!(status["mode"] != "detached", "{what}: {status}");
        }
    }

    /// Does `steps` of qemu-io, which must all succeed.
    pub fn qemu_io(&self, steps: &[&str]) {
        tools::qemu_io(&self.uri(), steps);
    }

    /// A guest that writes at random until it is stopped.
    pub fn load(&self, seed: u64) -> Load {
        Load::start(&self.uri(), seed)
    }

    /// What it can go back to.
    pub fn points(&self) -> Value {
        self.bench.json(&["points", &self.name])
    }

    /// The holes of its timeline but for the time before its first point.
    pub fn holes(&self) -> Vec<Value> {
        let points = self.points();
        let holes = points["holes"].as_array().expect("a list of holes").iter();
        holes.filter(|hole| hole["after_lsn"] != 0).cloned().collect()
    }

    /// Restores a point to a new file.
    pub fn restore(&self, at: &str) -> PathBuf {
        let output = self.bench.path(&format!("{}-{}.img", self.name, at.replace([':', '/'], "-")));
        self.bench.json(&["restore", &self.name, "--at", at, "--output", &text(&output), "--force"]);
        output
    }

    /// Tries to restore a point that is not there: what was said.
    pub fn restore_fails(&self, at: &str) -> Said {
        let output = self.bench.path("refused.img");
        let said = self.bench.run(&["restore", &self.name, "--at", at, "--output", &text(&output)]);
        assert_ne!(said.code, 0, "{at} is no point");
        assert!(!output.exists(), "a failed restore left {}", output.display());
        said
    }

    /// Once everything is at the receiver: `latest` is the image, as qemu-img sees both.
    pub fn latest_is_the_image(&self) {
        self.settle();
        let restored = self.restore("latest");
        tools::assert_same_images(Path::new(&self.image), &restored);
    }

    /// These points, in their order, are each the effect of some first writes, and never of fewer
    /// than the point before: how many writes each has.
    pub fn points_are_prefixes(&self, points: &[u64], model: &Model) -> Vec<usize> {
        let mut counts: Vec<usize> = Vec::new();
        for lsn in points {
            let at = format!("lsn:{lsn}");
            let restored = self.restore(&at);
            let count = model.prefix_in(&restored, &at);
            std::fs::remove_file(restored).expect("remove a restored file");
            assert!(
                counts.last().is_none_or(|&last| count >= last),
                "{at} has {count} writes, after {counts:?}"
            );
            counts.push(count);
        }
        counts
    }

    /// The ends of intervals and points within, in their order; at most `count`, spread over all.
    pub fn offered_points(&self, count: usize) -> Vec<u64> {
        let points = self.points();
        let mut lsns = Vec::new();
        for interval in points["intervals"].as_array().expect("a list of intervals") {
            let end = |name: &str| interval[name].as_u64().expect("an LSN");
            let (from, to) = (end("from_lsn"), end("to_lsn"));
            lsns.extend([from, from + (to - from) / 3, from + (to - from) / 2, to]);
        }
        lsns.dedup();
        let last = lsns.len() - 1;
        (0..=count.min(last)).map(|nth| lsns[nth * last / count.min(last)]).collect()
    }

    /// Some of the points that are offered, which the seed chooses, are each the effect of some first writes;
    /// and whatever lies between two intervals is a hole with a reason.
    pub fn timeline_holds(&self, seed: u64, count: usize, model: &Model) {
        let points = self.points();
        let list = |name: &str| points[name].as_array().unwrap_or_else(|| panic!("{name}: {points}")).clone();
        let lsn = |of: &Value, name: &str| of[name].as_u64().unwrap_or_else(|| panic!("{name}: {points}"));
        let (intervals, holes) = (list("intervals"), list("holes"));
        for pair in intervals.windows(2) {
            let (after, before) = (lsn(&pair[0], "to_lsn"), lsn(&pair[1], "from_lsn"));
            let is_it = |hole: &&Value| hole["after_lsn"] == after && hole["before_lsn"] == before;
            let hole = holes.iter().find(is_it);
            let hole = hole.unwrap_or_else(|| panic!("no hole from {after} to {before}: {points}"));
            let told = |name: &str| hole[name].as_str().is_some_and(|text| !text.is_empty());
            assert!(told("reason") && told("reason_code"), "{hole}");
        }
        let mut random = Random(seed);
        let mut chosen: Vec<u64> = (0..count)
            .map(|_| {
                let interval = &intervals[random.below(intervals.len() as u64) as usize];
                let (from, to) = (lsn(interval, "from_lsn"), lsn(interval, "to_lsn"));
                from + random.below(to - from + 1)
            })
            .collect();
        chosen.sort_unstable();
        self.points_are_prefixes(&chosen, model);
    }

    /// The point after the first `writes` of a load that began when the last LSN was `before`.
    pub fn point_is_the_model(&self, before: u64, writes: usize, model: &Model) {
        let at = format!("lsn:{}", before + writes as u64);
        let restored = self.restore(&at);
        model.assert_is_in(&restored, writes, &at);
        std::fs::remove_file(restored).expect("remove a restored file");
    }
}
