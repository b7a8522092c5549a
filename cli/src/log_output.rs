//! Where a daemon's logs go: to stderr, and to nowhere where that takes none.
//!
//! Nothing waits for whoever reads them, and nothing ends for want of room: a pipe that nobody reads any more, a terminal
//! that was stopped and a file system that is full cost messages, which are counted and told of when there is room
//! again.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    sync::{Mutex, PoisonError},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing_subscriber::fmt::MakeWriter;

/// A pipe that has room takes so much at once (`PIPE_BUF` of Linux).
const AT_ONCE: usize = 4096;

/// The logs of a process.
pub(crate) struct LogOutput {
    json: bool,
    state: Mutex<State>,
}

struct State {
    output: File,
    /// Messages that were lost since the last one that was written.
    lost: u64,
    /// The last one was written in part.
    is_cut: bool,
}

/// Takes one message.
pub(crate) struct Message<'a>(&'a LogOutput);

impl LogOutput {
    /// Logs go to `output`, as JSON or as text.
    pub(crate) fn new(output: File, json: bool) -> Self {
        Self { json, state: Mutex::new(State { output, lost: 0, is_cut: false }) }
    }

    /// To stderr.
    ///
    /// # Errors
    /// When there is no other descriptor for it.
    pub(crate) fn stderr(json: bool) -> io::Result<Self> {
        Ok(Self::new(io::stderr().as_fd().try_clone_to_owned()?.into(), json))
    }

    fn take(&self, message: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.is_cut || state.lost > 0 {
            let told = self.lost_text(state.lost + u64::from(state.is_cut));
            let begin: &[u8] = if state.is_cut { b"\n" } else { b"" };
            if state.put(&[begin, told.as_bytes()].concat()).is_err() {
                state.lost += 1;
                return;
            }
            (state.lost, state.is_cut) = (0, false);
        }
        if state.put(message).is_err() && !state.is_cut {
            state.lost += 1;
        }
    }

    fn lost_text(&self, lost: u64) -> String {
        let what = "messages were lost here: where the log goes took none";
        match self.json {
            true => {
                let fields = serde_json::json!({ "message": what, "lost": lost });
                let line = serde_json::json!({ "level": "WARN", "fields": fields, "target": "backtide" });
                format!("{line}\n")
            }
            false => format!("WARN backtide: {lost} {what}\n"),
        }
    }
}

impl State {
    /// Writes all of it, unless that would have to be waited for.
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut left = bytes;
        while !left.is_empty() {
            let written = match self.has_room() {
                true => self.output.write(&left[..left.len().min(AT_ONCE)]),
                false => Err(io::ErrorKind::WouldBlock.into()),
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => {
                    left = &left[length..];
                    self.is_cut = !left.is_empty();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        let mut fds = [PollFd::new(&self.output, PollFlags::OUT)];
        // An error is found by the write.
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}

impl<'a> MakeWriter<'a> for LogOutput {
    type Writer = Message<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        Message(self)
    }
}

impl Write for Message<'_> {
    /// Never fails: the subscriber would print that to stderr, which panics where that is what failed.
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        self.0.take(message);
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_pipe_that_nobody_reads_costs_messages_and_no_time() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = LogOutput::new(File::from(std::os::fd::OwnedFd::from(writer)), true);
        let message = format!("{{\"message\":\"{}\"}}\n", "x".repeat(5000));
        // Far more than a pipe holds; this would never end.
        for _ in 0..100 {
            output.make_writer().write_all(message.as_bytes()).unwrap();
        }
        let mut first = vec![0; 40_000];
        reader.read_exact(&mut first).unwrap();
        output.make_writer().write_all(b"{\"message\":\"after\"}\n").unwrap();
        drop(output);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        let text = String::from_utf8(first).unwrap() + &rest;
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.last(), Some(&"{\"message\":\"after\"}"));
        let whole = lines.iter().filter(|line| line.len() + 1 == message.len()).count() as u64;
        let told: serde_json::Value = serde_json::from_str(lines[lines.len() - 2]).unwrap();
        assert_eq!(told["fields"]["lost"], 100 - whole, "{whole} of 100");
        assert!(whole > 0);
    }

    #[test]
    fn a_full_file_system_is_no_failure() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = LogOutput::new(full, false);
        output.make_writer().write_all(b"nobody reads this\n").unwrap();
        assert_eq!(output.state.lock().unwrap().lost, 1);
    }
}
