//! An agent that a test plays: it gives the answers that the test has for it, one after the other.

use std::sync::{Arc, Mutex};

use backtide_agent_api::{AgentStatus, DiskStatus};
use backtide_control::Address;
use clap::Parser;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
};

use crate::{arguments::Arguments, context::Context};

/// One that answers a call with each of its answers.
pub(crate) struct PlayedAgent {
    directory: tempfile::TempDir,
    calls: Arc<Mutex<Vec<String>>>,
}

/// What a call is answered: an HTTP status and a body; none is the end of the connection.
pub(crate) type Answer = Option<(u16, Value)>;

/// The status of an agent, with these disks.
pub(crate) fn status_of(instance: &str, disks: Vec<DiskStatus>) -> AgentStatus {
    AgentStatus {
        version: "1".to_owned(),
        now: None,
        instance: instance.to_owned(),
        restart_failure: None,
        nbd_listen: None,
        certificate_warnings: Vec::new(),
        disks,
    }
}

impl PlayedAgent {
    /// After the last answer it says nothing more: whoever asks then waits until the test sees it.
    pub(crate) fn answering(answers: impl IntoIterator<Item = Answer, IntoIter: Send + 'static>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("agent.sock")).unwrap();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&calls);
        let answers = answers.into_iter();
        tokio::spawn(async move {
            for answer in answers {
                let (mut client, _) = listener.accept().await.unwrap();
                let call = one_call(&mut client).await;
                heard.lock().unwrap().push(call);
                let Some((status, body)) = answer else { continue };
                let body = body.to_string();
                let head = format!(
                    "HTTP/1.1 {status} x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    body.len()
                );
                client.write_all((head + &body).as_bytes()).await.unwrap();
            }
            std::future::pending::<()>().await;
        });
        Self { directory, calls }
    }

    /// One that shows this of a disk, call by call.
    pub(crate) fn showing(disks: impl IntoIterator<Item = DiskStatus>) -> Self {
        let shown = |disk| Some((200, serde_json::to_value(status_of("one", vec![disk])).unwrap()));
        Self::answering(disks.into_iter().map(shown).collect::<Vec<_>>())
    }

    /// Where it is asked. What it answers may as well be a receiver's words.
    pub(crate) fn address(&self) -> Address {
        Address::unix(self.directory.path().join("agent.sock"))
    }

    /// Of a command that is given its address.
    pub(crate) fn context(&self) -> Context {
        let address = self.address().to_string();
        Context::new(&Arguments::try_parse_from(["backtide", "--agent", &address, "status"]).unwrap())
    }

    /// What it was asked: method and path of each call.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

async fn one_call(client: &mut UnixStream) -> String {
    let mut client = BufReader::new(client);
    let (mut first, mut length) = (String::new(), 0);
    client.read_line(&mut first).await.unwrap();
    loop {
        let mut line = String::new();
        client.read_line(&mut line).await.unwrap();
        match line.trim_end().split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.parse().unwrap();
            }
            Some(_) => {}
            None => break,
        }
    }
    client.read_exact(&mut vec![0; length]).await.unwrap();
    first.trim_end().trim_end_matches(" HTTP/1.1").to_owned()
}
