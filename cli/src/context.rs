//! What every command has: whom to ask, and where to write.

use std::{
    io::{self, IsTerminal, Write},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use backtide_agent_api::AgentClient;
use backtide_control::{Address, Tell};
use backtide_receiver_api::ReceiverClient;
use backtide_units::DiskName;
use serde::Serialize;

use crate::{
    arguments::{Arguments, ReceiverApi},
    ending::{Failure, failed},
    output::printable_lines,
    places::Places,
};

/// The global arguments, with their defaults filled in.
#[derive(Debug)]
pub(crate) struct Context {
    json: bool,
    agent: Option<Address>,
    places: Places,
    /// Something was said of what was done, so that the command ends with warnings.
    remarked: AtomicBool,
    /// The disk that the agent was asked to do something with, and does also when nobody waits any more.
    at_agent: OnceLock<DiskName>,
}

impl Context {
    /// Of one run of the command.
    pub(crate) fn new(arguments: &Arguments) -> Self {
        let places = Places::of_this_user();
        let remarked = AtomicBool::new(false);
        let at_agent = OnceLock::new();
        Self { json: arguments.json, agent: arguments.agent.clone(), places, remarked, at_agent }
    }

    /// Whether scripts read the output.
    pub(crate) fn json(&self) -> bool {
        self.json
    }

    /// Default places.
    pub(crate) fn places(&self) -> &Places {
        &self.places
    }

    /// Where the agent is asked.
    pub(crate) fn agent_address(&self) -> Result<Address, Failure> {
        self.agent.clone().map_or_else(|| self.places.agent_api(), Ok)
    }

    /// The agent to ask.
    pub(crate) fn agent(&self) -> Result<AgentClient, Failure> {
        Ok(AgentClient::new(&self.agent_address()?)?.telling(self.teller()))
    }

    /// The agent's address as it was given, if it was.
    pub(crate) fn given_agent(&self) -> Option<Address> {
        self.agent.clone()
    }

    /// Where the receiver is asked.
    pub(crate) fn receiver_address(&self, given: &ReceiverApi) -> Result<Address, Failure> {
        given.receiver.clone().map_or_else(|| self.places.receiver_api(), Ok)
    }

    /// The receiver to ask.
    pub(crate) fn receiver(&self, given: &ReceiverApi) -> Result<ReceiverClient, Failure> {
        Ok(ReceiverClient::new(&self.receiver_address(given)?)?.telling(self.teller()))
    }

    fn teller(&self) -> Tell {
        let json = self.json;
        Tell::new(move |text| say_waiting(text, json))
    }

    /// Prints a result: `value` as JSON, or else the text. That nobody reads it is no error, and changes nothing of how the
    /// command ends.
    pub(crate) fn print(&self, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), Failure> {
        match self.print_next(value, text) {
            Err(Failure::ClosedPipe) => Ok(()),
            printed => printed,
        }
    }

    /// The same of one result of many, where there is no need for the next when nobody reads.
    pub(crate) fn print_next(
        &self,
        value: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        if self.json {
            let json = serde_json::to_string(value)
                .map_err(|error| failed(format!("cannot write the result as JSON: {error}")))?;
            return self.print_line(&json);
        }
        self.print_line(&text())
    }

    /// Prints one piece of data, with its line's end.
    pub(crate) fn print_line(&self, text: &str) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        let written = stdout
            .write_all(text.trim_end_matches('\n').as_bytes())
            .and_then(|()| stdout.write_all(b"\n"))
            .and_then(|()| stdout.flush());
        match written {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::ClosedPipe),
            Err(error) => Err(failed(format!("cannot write to stdout: {error}"))),
        }
    }

    /// Tells the person something that is no data; scripts do not get it.
    pub(crate) fn tell(&self, text: &str) {
        if !self.json {
            // Nothing can be done when stderr is gone.
            let _ = writeln!(io::stderr(), "{}", printable_lines(text));
        }
    }

    /// Warns; scripts get it too, as a line of its own on stderr.
    pub(crate) fn warn(&self, text: &str) {
        let line = if self.json {
            serde_json::json!({ "warning": text }).to_string()
        } else {
            format!("warning: {}", printable_lines(text))
        };
        // Nothing can be done when stderr is gone.
        let _ = writeln!(io::stderr(), "{line}");
    }

    /// Warns of what a point lacks that was asked for, if it lacks anything: then the command ends with warnings when it is done.
    pub(crate) fn remark(&self, warning: Option<&str>) {
        if let Some(warning) = warning {
            self.warn(warning);
            self.remarked.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it has warned so.
    pub(crate) fn has_remarked(&self) -> bool {
        self.remarked.load(Ordering::Relaxed)
    }

    /// From now on the agent goes on with this disk, also when the command is interrupted.
    pub(crate) fn goes_on_at_agent(&self, disk: &DiskName) {
        // A command asks it for one disk.
        self.at_agent.get_or_init(|| disk.clone());
    }

    /// With which disk it does, if with any.
    pub(crate) fn at_agent(&self) -> Option<&DiskName> {
        self.at_agent.get()
    }

    /// Whether a person watches stderr, so that progress can be drawn.
    pub(crate) fn draws_progress(&self) -> bool {
        !self.json && io::stderr().is_terminal()
    }
}

/// Says that something takes long, to scripts too: as a line of its own on stderr.
pub(crate) fn say_waiting(text: &str, json: bool) {
    let line = if json { serde_json::json!({ "waiting": text }).to_string() } else { text.to_owned() };
    // Nothing can be done when stderr is gone.
    let _ = writeln!(io::stderr(), "{line}");
}
