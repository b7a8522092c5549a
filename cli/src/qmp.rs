//! The virtual machine that uses a disk, asked over QEMU's machine protocol (QMP): whether it runs, and to stop.

use std::{path::Path, time::Duration};

use backtide_control::{ApiError, ErrorCode};
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

/// Whether what QEMU calls a node names the server at `place`, and none whose name only begins so.
fn names(file: &str, place: &str) -> bool {
    let ends = |rest: &str| rest.is_empty() || rest.starts_with(['/', '&', '?', '"']);
    file.match_indices(place).any(|(at, found)| ends(&file[at + found.len()..]))
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

    /// Whether a block node of the machine is a client of the NBD server at `place`: its socket's path, or its
    /// host and port.
    pub(crate) async fn uses(&mut self, place: &str) -> Result<bool, Failure> {
        let nodes = self.execute("query-named-block-nodes", json!({ "flat": true })).await?;
        let nodes = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
        let is_client = |node: &Value| {
            let file = node["file"].as_str().unwrap_or_default();
            node["drv"].as_str() == Some("nbd") && names(file, place)
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
        assert!(names("nbd://127.0.0.1:1080/vm1", "127.0.0.1:1080"));
        assert!(!names("nbd://127.0.0.1:10809/vm1", "127.0.0.1:1080"));
    }
}
