//! Receivers to test: on a real directory, or on a storage in memory that can be filled.

use std::{path::PathBuf, sync::Arc};

use backtide_control::Address;
use backtide_log_receiver::{Config, Limits, Receiver};
use backtide_receiver_api::ReceiverClient;
use backtide_storage::Storage;
use backtide_units::ByteCount;
use tempfile::TempDir;

/// A directory with a store in it.
pub(crate) struct Place {
    dir: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Small segments, so that the tests cross their seams.
    pub(crate) fn config(&self) -> Config {
        let limits = Limits {
            ingest_threads: 2,
            commit_together: 4,
            segment_bytes: ByteCount(1 << 20),
            free_bytes_min: ByteCount(1 << 16),
            ..Limits::default()
        };
        Config { run: Some(self.path("run")), limits, ..Config::new(self.store()) }
    }

    pub(crate) async fn start(&self) -> Receiver {
        Receiver::start(self.config()).await.unwrap()
    }

    pub(crate) async fn start_on(&self, storage: impl Storage) -> Receiver {
        Receiver::start_on_storage(Arc::new(storage), self.config()).await.unwrap()
    }

    /// Why a receiver does not start, with all causes.
    pub(crate) async fn refusal(&self, config: Config) -> String {
        match Receiver::start(config).await {
            Ok(_) => panic!("the receiver started"),
            Err(error) => {
                let mut text = error.to_string();
                let mut cause = std::error::Error::source(&error);
                while let Some(error) = cause {
                    text = format!("{text}: {error}");
                    cause = error.source();
                }
                text
            }
        }
    }

    pub(crate) fn address(&self, name: &str) -> Address {
        Address::unix(self.path(name))
    }
}

pub(crate) fn client(receiver: &Receiver) -> ReceiverClient {
    ReceiverClient::new(receiver.api_address()).unwrap()
}
