//! What a disk was asked for, and when: the log of nbdkit's log filter, in front of a disk in memory.
//!
//! The filter writes a line when a request has come and one before it is answered, so the order of the
//! lines tells what a request can rely on: a flush makes stable what was answered before it came.

use std::path::{Path, PathBuf};

use crate::{Bench, tools};

/// A disk in memory behind an NBD server that writes down what it is asked for.
pub struct LoggedDisk {
    server: Option<tools::Beside>,
    log: PathBuf,
    /// Where it is served.
    pub uri: String,
}

/// A request, and the lines of the log at which it came and was answered.
#[derive(Clone, Debug)]
struct Request {
    connection: u64,
    id: u64,
    kind: String,
    offset: u64,
    length: u64,
    fua: bool,
    came: usize,
    answered: Option<usize>,
}

/// All that a disk was asked for so far.
#[derive(Debug)]
pub struct Requests(Vec<Request>);

impl LoggedDisk {
    /// Serves zeroes of this size.
    pub fn start(bench: &Bench, name: &str, bytes: u64) -> Self {
        let (socket, log) = (bench.name(&format!("{name}.sock")), bench.name(&format!("{name}.log")));
        let (size, file) = (bytes.to_string(), format!("logfile={log}"));
        let arguments = ["-f", "-U", &socket, "--filter=log", "memory", &size, &file];
        let server = tools::Beside::start("nbdkit", &arguments);
        tools::wait_for_socket(socket.as_ref());
        Self { server: Some(server), log: log.into(), uri: format!("nbd+unix:///?socket={socket}") }
    }

    /// What it was asked for until now.
    pub fn requests(&self) -> Requests {
        Requests::read(&self.log_until(u64::MAX))
    }

    /// What it had been asked for when its log had this length.
    pub fn requests_until(&self, length: u64) -> Requests {
        Requests::read(&self.log_until(length))
    }

    fn log_until(&self, length: u64) -> String {
        let mut log = std::fs::read_to_string(&self.log).expect("read a log");
        log.truncate(usize::try_from(length).unwrap_or(usize::MAX).min(log.len()));
        log
    }

    /// Where its log lies: how long that is tells how far the disk has come.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Sends its server a signal, such as `STOP`.
    pub fn signal(&self, name: &str) {
        self.server.as_ref().expect("it runs").signal(name);
    }

    /// Ends it where it is: nothing that is not in its log has happened.
    pub fn kill(&mut self) {
        self.server.take().expect("it runs").kill();
    }
}

impl Requests {
    fn read(log: &str) -> Self {
        let mut requests: Vec<Request> = Vec::new();
        // A last line without an end is still being written.
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        for (line, text) in whole.lines().enumerate() {
            let Some((_, rest)) = text.split_once("connection=") else { continue };
            let mut words = rest.split(' ');
            let connection = words.next().and_then(number).expect("the number of a connection");
            let kind = words.next().expect("what was asked for");
            let value = |name: &str| rest.split(' ').find_map(|word| number(word.strip_prefix(name)?));
            let Some(id) = value("id=") else { continue };
            if kind.starts_with("...") {
                let same = |request: &&mut Request| (request.connection, request.id) == (connection, id);
                let request = requests.iter_mut().rev().find(same).expect("an answer to something");
                assert_eq!(value("return="), Some(0), "{text}");
                request.answered = Some(line);
            } else {
                let (offset, length) = (value("offset="), value("count="));
                requests.push(Request {
                    connection,
                    id,
                    kind: kind.to_owned(),
                    offset: offset.unwrap_or(0),
                    length: length.unwrap_or(0),
                    fua: value("fua=") == Some(1),
                    came: line,
                    answered: None,
                });
            }
        }
        Self(requests)
    }

    /// The ranges that would survive the end of the disk's power, where nothing is changed twice: what was changed
    /// stably, and what a flush covers that came after the answer to the change, and was answered. In their order,
    /// from where each begins to where it ends.
    pub fn stable(&self) -> Vec<(u64, u64)> {
        let last_flush = self.0.iter().filter(|one| one.kind == "Flush" && one.answered.is_some());
        let last_flush = last_flush.map(|flush| flush.came).max();
        let is_stable = |one: &&Request| {
            let changes = ["Write", "Zero", "Trim"].contains(&one.kind.as_str());
            changes && one.answered.is_some_and(|line| one.fua || last_flush.is_some_and(|came| came > line))
        };
        let mut stable: Vec<(u64, u64)> =
            self.0.iter().filter(is_stable).map(|one| (one.offset, one.offset + one.length)).collect();
        stable.sort_unstable();
        stable
    }

    /// Whether all of this range is [`stable`](Self::stable).
    pub fn are_stable(&self, offset: u64, length: u64) -> bool {
        let covered = self
            .stable()
            .into_iter()
            .fold(offset, |covered, (from, to)| if from <= covered { covered.max(to) } else { covered });
        covered >= offset + length
    }

    /// How many flushes were answered.
    pub fn flushes(&self) -> usize {
        self.0.iter().filter(|one| one.kind == "Flush" && one.answered.is_some()).count()
    }
}

/// A decimal number, or one in hexadecimal.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::Requests;

    const LOG: &str = "\
2026-11-22 15:34:01.003780 connection=1 Write id=1 offset=0x2000 count=0x1000 fua=0 ...
2026-11-22 15:34:01.003838 connection=2 Flush id=1 ...
2026-11-22 15:34:01.003931 connection=1 ...Write id=1 return=0
2026-11-22 15:34:01.003938 connection=2 ...Flush id=1 return=0
2026-11-22 15:34:01.004010 connection=1 Write id=2 offset=0x3000 count=0x1000 fua=1 ...
2026-11-22 15:34:01.004015 connection=1 ...Write id=2 return=0
";

    #[test]
    fn a_flush_that_came_before_the_answer_makes_nothing_stable() {
        let early = Requests::read(LOG);
        assert!(!early.are_stable(0x2000, 0x1000), "the flush came before the write was answered");
        assert!(early.are_stable(0x3000, 0x1000), "it was to be stable by itself");
        let begun = format!("{LOG}2026-11-22 15:34:02 connection=3 Flush id=1 ...\n");
        assert!(!Requests::read(&begun).are_stable(0x2000, 0x1000), "this one has no answer");
        let flushed = format!("{begun}2026-11-22 15:34:02 connection=3 ...Flush id=1 return=0\n");
        assert!(Requests::read(&flushed).are_stable(0x2000, 0x2000));
        assert!(!Requests::read(&flushed).are_stable(0x2000, 0x2001), "one byte more was never written");
    }
}
