//! Another host: an agent with its own state, sockets and image, at the same receiver.

use serde_json::Value;

use crate::{Bench, Daemon, Doomed, Said};

/// The second host of a story, which may have the disk `vm1` with the image `b.img`.
pub struct OtherHost<'bench> {
    bench: &'bench Bench,
    api: String,
}

impl<'bench> OtherHost<'bench> {
    /// A host on which no agent runs yet.
    pub fn new(bench: &'bench Bench) -> Self {
        std::fs::create_dir(bench.path("b")).expect("make a directory");
        Self { bench, api: bench.socket("b/agent.sock") }
    }

    /// The same with its agent.
    pub fn start(bench: &'bench Bench) -> (Self, Daemon) {
        let other = Self::new(bench);
        let agent = other.agent();
        (other, agent)
    }

    /// Its agent.
    pub fn agent(&self) -> Daemon {
        let state = self.bench.name("b/state");
        self.bench.daemon(&["agent", "run", "--api", &self.api, "--state", &state])
    }

    /// The same, to die at a kill point as with [`Bench::doomed`].
    pub fn doomed(&self, kill_at: &str) -> Doomed {
        let state = self.bench.name("b/state");
        self.bench.doomed(&["agent", "run", "--api", &self.api, "--state", &state], kill_at)
    }

    /// Runs a command with its agent.
    pub fn run(&self, arguments: &[&str]) -> Said {
        self.bench.run(&[&["--agent", &self.api], arguments].concat())
    }

    /// Has the disk go on here, with more arguments.
    pub fn failover(&self, rest: &[&str]) -> Said {
        let (image, stream) = (self.bench.name("b.img"), self.bench.socket("stream.sock"));
        self.run(&[&["failover", "vm1", &image, "--receiver", &stream], rest].concat())
    }

    /// The disk's status here, whether it is all right or not.
    pub fn status(&self) -> Value {
        let said = self.run(&["status", "vm1"]);
        assert!([0, 3].contains(&said.code), "{said:?}");
        let status: Value = serde_json::from_str(&said.stdout).expect("a status is JSON");
        status["disks"][0].clone()
    }

    /// Where it is served here.
    pub fn uri(&self) -> String {
        self.status()["nbd_uri"].as_str().expect("a disk has a URI").to_owned()
    }

    /// Waits until nothing is missing, and the receiver has everything.
    pub fn settle(&self) {
        loop {
            let status = self.status();
            if status["hydration"].is_null() {
                break;
            }
            assert!(status["mode"] != "detached", "{status}");
        }
        for state in ["sync", "durable"] {
            assert_eq!(self.run(&["wait", "vm1", "--for", state]).code, 0);
        }
    }
}
