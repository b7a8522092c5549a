//! The virtual machine that uses a disk, asked over QEMU's machine protocol (QMP): whether it runs, and to stop.

use std::{path::Path, time::Duration};

use backtide_control::{ApiError, ErrorCode};
use backtide_export::NbdUri;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::ending::Failure;

/// How long QEMU may take to answer. It serves one client at a time: another one makes this one wait.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Longer lines are no QMP; a machine with very many block nodes has long ones.
const LINE_BYTES_MAX: usize = 16 << 20;

/// A server in an NBD client's own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerPlace {
    /// Its socket's path, or its host and port.
    pub(crate) place: String,
    /// The export's name, where it has several.
    pub(crate) export: Option<String>,
}

impl ServerPlace {
    /// Whether what QEMU calls a node names this server, and none whose name only begins or ends so.
    fn is_named(&self, file: &str) -> bool {
        let begins = |before: &str| ["socket=", "\"", "://"].iter().any(|begin| before.ends_with(begin));
        let ends = |rest: &str| rest.is_empty() || rest.starts_with(['/', '&', '?', '"']);
        let here = |(at, found): (usize, &str)| begins(&file[..at]) && ends(&file[at + found.len()..]);
        file.match_indices(&self.place).any(here)
            && self.export.as_ref().is_none_or(|export| export_of(file).as_ref() == Some(export))
    }
}

/// The export that a node is a client of.
fn export_of(file: &str) -> Option<String> {
    if let Some(options) = file.strip_prefix("json:") {
        let options: Value = serde_json::from_str(options).ok()?;
        return Some(options["export"].as_str()?.to_owned());
    }
    Some(file.parse::<NbdUri>().ok()?.export)
}

/// A connection to a machine's QMP socket.
pub(crate) struct Qmp {
    socket: String,
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Qmp {
    /// Connects and gets ready to ask.
    ///
    /// # Errors
    /// When nobody answers, or no QEMU.
    pub(crate) async fn connect(socket: &Path) -> Result<Self, Failure> {
        let shown = socket.display().to_string();
        let stream = UnixStream::connect(socket).await.map_err(|error| {
            ApiError::new(ErrorCode::Unreachable, format!("connect to QMP at {shown}: {error}"))
        })?;
        let (reader, writer) = stream.into_split();
        let mut qmp = Self { socket: shown, reader: BufReader::new(reader), writer };
        let greeting = qmp.within(Self::line).await?;
        if greeting.get("QMP").is_none() {
            return Err(qmp.strange("no greeting of QMP"));
        }
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Whether the guest's processors run, and what QEMU calls its state.
    pub(crate) async fn runs(&mut self) -> Result<(bool, String), Failure> {
        let status = self.execute("query-status", json!({})).await?;
        let state = status["status"].as_str().unwrap_or("unknown").to_owned();
        match status["running"].as_bool() {
            Some(running) => Ok((running, state)),
            None => Err(self.strange("query-status without running")),
        }
    }

    /// Whether a block node of the machine is a client of one of these NBD servers.
    pub(crate) async fn uses(&mut self, servers: &[ServerPlace]) -> Result<bool, Failure> {
        let nodes = self.execute("query-named-block-nodes", json!({ "flat": true })).await?;
        let nodes = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
        let is_client = |node: &Value| {
            let file = node["file"].as_str().unwrap_or_default();
            node["drv"].as_str() == Some("nbd") && servers.iter().any(|server| server.is_named(file))
        };
        Ok(nodes.iter().any(is_client))
    }

    /// Stops the guest's processors; what they had in flight is done when this returns.
    pub(crate) async fn stop(&mut self) -> Result<(), Failure> {
        self.execute("stop", json!({})).await.map(drop)
    }

    /// Lets them go on.
    pub(crate) async fn cont(&mut self) -> Result<(), Failure> {
        self.execute("cont", json!({})).await.map(drop)
    }

    async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        if let Err(error) = self.writer.write_all(line.as_bytes()).await {
            return Err(self.strange(&error.to_string()));
        }
        self.within(async |qmp: &mut Self| {
            loop {
                // Events come between.
                let mut answer = qmp.line().await?;
                if let Some(value) = answer.get_mut("return") {
                    return Ok(value.take());
                }
                if let Some(error) = answer.get("error") {
                    let why = error["desc"].as_str().unwrap_or("without a reason");
                    let message = format!("QEMU at {} refuses {command}: {why}", qmp.socket);
                    return Err(ApiError::new(ErrorCode::Refused, message).into());
                }
            }
        })
        .await
    }

    async fn within<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(ANSWER_TIME, work(self)).await {
            Ok(result) => result,
            Err(_) => {
                let message = format!("QMP at {} does not answer", self.socket);
                Err(ApiError::new(ErrorCode::Unreachable, message)
                    .with_hint("it serves one client at a time: is there another one, such as libvirt?")
                    .into())
            }
        }
    }

    async fn line(&mut self) -> Result<Value, Failure> {
        let mut line = Vec::new();
        loop {
            let available = match self.reader.fill_buf().await {
                Ok([]) => return Err(self.strange("it has hung up")),
                Ok(bytes) => bytes,
                Err(error) => {
                    let why = error.to_string();
                    return Err(self.strange(&why));
                }
            };
            let end = available.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(available.len(), |end| end + 1);
            line.extend_from_slice(&available[..taken]);
            self.reader.consume(taken);
            if line.len() > LINE_BYTES_MAX {
                return Err(self.strange("a line without an end"));
            }
            if end.is_some() {
                return serde_json::from_slice(&line).map_err(|error| self.strange(&error.to_string()));
            }
        }
    }

    fn strange(&self, why: &str) -> Failure {
        let message = format!("QMP at {}: {why}", self.socket);
        ApiError::new(ErrorCode::Failed, message).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(file: &str, place: &str) -> bool {
        ServerPlace { place: place.to_owned(), export: None }.is_named(file)
    }

    #[test]
    fn a_server_is_named_wholly() {
        for file in [
            "nbd+unix:///vm1?socket=/run/vm1",
            "nbd+unix:///vm1?socket=/run/vm1&a=b",
            r#"json:{"driver": "nbd", "server.path": "/run/vm1", "server.type": "unix"}"#,
        ] {
            assert!(names(file, "/run/vm1"), "{file}");
        }
        assert!(!names("nbd+unix:///vm1?socket=/run/vm10", "/run/vm1"));
        assert!(!names("nbd+unix:///vm1?socket=/run/vm1.sock", "/run/vm1"));
        assert!(!names("nbd+unix:///vm1?socket=/srv/run/vm1", "/run/vm1"));
        assert!(!names(r#"json:{"driver": "nbd", "server.path": "/srv/run/vm1"}"#, "/run/vm1"));
        assert!(names("nbd://127.0.0.1:1080/vm1", "127.0.0.1:1080"));
        assert!(!names("nbd://127.0.0.1:10809/vm1", "127.0.0.1:1080"));
        assert!(!names("nbd://11.2.3.4:10809/vm1", "1.2.3.4:10809"));
    }

    #[test]
    fn where_several_are_served_it_is_the_export_that_counts() {
        let shared =
            |export: &str| ServerPlace { place: "/run/all".to_owned(), export: Some(export.to_owned()) };
        for file in [
            "nbd+unix:///vm1?socket=/run/all",
            r#"json:{"driver": "nbd", "server.path": "/run/all", "export": "vm1"}"#,
        ] {
            assert!(shared("vm1").is_named(file), "{file}");
            assert!(!shared("vm10").is_named(file) && !shared("vm").is_named(file), "{file}");
        }
        assert!(!shared("vm1").is_named("nbd+unix:///vm1?socket=/run/one"));
        assert!(!shared("vm1").is_named("nbd+unix://?socket=/run/all"));
    }
}
