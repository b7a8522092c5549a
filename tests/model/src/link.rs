//! The link: connections that carry frames in order, and break. What arrives of a broken one is a
//! prefix of what was sent; with ghosts, perhaps after the frames of the next connection.

use std::collections::VecDeque;

use backtide_protocol::{CloseCode, Message};

use crate::{
    config::Config,
    receiver::{Session, Taken, close},
    world::{Connection, World},
};

impl World {
    pub(crate) fn connect(&mut self, config: &Config) {
        let hello = Message::Hello(self.filter.hello());
        self.connected += 1;
        self.connections.push(Connection {
            number: self.connected,
            agent_side: true,
            welcomed: false,
            owns: false,
            session: Session::AwaitHello,
            up: VecDeque::from([(1, hello)]),
            down: VecDeque::new(),
            jobs: VecDeque::new(),
        });
        self.carry_out(config);
    }

    /// Sends the filter's next frame, if there is one and the link takes it.
    pub(crate) fn send_one(&mut self, config: &Config) -> bool {
        let now = self.moment();
        let Some(connection) = self.connections.last_mut().filter(|connection| connection.agent_side) else {
            return false;
        };
        if !connection.welcomed || connection.up.len() >= config.lane || !self.filter.has_to_send() {
            return false;
        }
        let frame = self.filter.poll_send(now);
        connection.up.extend(frame);
        true
    }

    pub(crate) fn arrive(&mut self, config: &Config, index: usize) {
        let connection = &mut self.connections[index];
        let (frame, message) = connection.up.pop_front().expect("a frame is on its way");
        match (&mut connection.session, message) {
            (Session::Ended, _) => {}
            (Session::AwaitHello, Message::Hello(hello)) => match self.receiver.claim(&hello, frame) {
                Ok(session) => {
                    for other in self.connections.iter_mut().filter(|other| other.owns) {
                        other.close(CloseCode::Busy, "replaced");
                    }
                    self.connections[index].session = session;
                    self.connections[index].owns = true;
                }
                Err(code) => {
                    let current = self.connections[index].agent_side;
                    assert!(!current || self.rival.is_some(), "the agent that is alive is refused: {code:?}");
                    self.connections[index].close(code, "refused");
                }
            },
            (Session::AwaitHello | Session::AwaitClaim { .. }, other) => {
                panic!("the agent sends a {} before its welcome", other.name())
            }
            (Session::Streaming { received, .. }, message) => {
                *received = frame;
                if connection.owns {
                    self.take(index, message);
                } else {
                    connection.close(CloseCode::Busy, "replaced");
                }
            }
        }
        self.settle(config, index);
        self.forget_ended();
        // The frame made room for another.
        self.carry_out(config);
    }

    fn take(&mut self, index: usize, message: Message) {
        match self.receiver.take(message) {
            Taken::Fine => {}
            Taken::Compared(result) => self.connections[index].jobs.push_back(result),
            Taken::Refused(code, why) => panic!("the receiver refuses a frame: {code:?}, {why}"),
        }
    }

    pub(crate) fn answer(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        let result = connection.jobs.pop_front().expect("it was asked for");
        if connection.agent_side && connection.session != Session::Ended {
            connection.down.push_back(Message::CompareResult(result));
        }
    }

    pub(crate) fn sync(&mut self, config: &Config) {
        self.receiver.sync();
        for index in 0..self.connections.len() {
            self.settle(config, index);
        }
        self.forget_ended();
    }

    fn settle(&mut self, config: &Config, index: usize) {
        let connection = &mut self.connections[index];
        let has_disk = matches!(connection.session, Session::AwaitClaim { .. } | Session::Streaming { .. });
        if has_disk && !connection.owns {
            return connection.close(CloseCode::Busy, "replaced");
        }
        if let Some(message) = connection.session.settle(&self.receiver, config.received_acks)
            && connection.agent_side
        {
            connection.down.push_back(message);
        }
    }

    pub(crate) fn deliver(&mut self, config: &Config) {
        let connection = self.connection().expect("it is connected");
        match connection.down.pop_front().expect("a message is on its way") {
            Message::Welcome(welcome) => {
                connection.welcomed = true;
                self.call(config, |filter, now| filter.connected(now, &welcome));
            }
            Message::Close(closed) => {
                let replaced = closed.code == CloseCode::Busy && (config.ghosts || self.rival.is_some());
                self.fenced |= closed.code == CloseCode::Fenced && self.rival.is_some();
                assert!(replaced || self.fenced, "the receiver closed the connection: {closed:?}");
                self.lose_connection(config);
            }
            other => self.call(config, |filter, now| filter.receive(now, other)),
        }
    }

    /// The agent's connection is gone.
    pub(crate) fn lose_connection(&mut self, config: &Config) {
        self.end_agent_side(config);
        self.call(config, |filter, now| filter.disconnected(now));
    }

    /// The agent has its connection no more; what it sent may still arrive.
    pub(crate) fn end_agent_side(&mut self, config: &Config) {
        let mut lost = self.connections.pop().expect("it is connected");
        assert!(lost.agent_side, "the agent's is the last");
        if config.ghosts && !lost.up.is_empty() && lost.session != Session::Ended {
            lost.agent_side = false;
            lost.down.clear();
            lost.jobs.clear();
            self.connections.clear();
            self.connections.push(lost);
        }
    }

    /// Connections of which nothing is left on either side.
    pub(crate) fn forget_ended(&mut self) {
        self.connections.retain(|connection| connection.agent_side || !connection.up.is_empty());
    }
}

impl Connection {
    pub(crate) fn close(&mut self, code: CloseCode, why: &str) {
        if self.session == Session::Ended {
            return;
        }
        self.session = Session::Ended;
        self.owns = false;
        self.jobs.clear();
        if self.agent_side {
            self.down.push_back(close(code, why));
        }
    }
}
