//! A look at what a receiver would find, by who does not become it: `receiver run --check`.
//!
//! Invariant: nothing is changed, and a running receiver's lock of the store is nobody's concern here.

use std::{io, path::Path, sync::Arc};

use backtide_export::BindError;
use backtide_storage::{RealStorage, Storage};
use uuid::Uuid;

use crate::{
    Config, StartError, StoreFileError, StoreId,
    disks::DISKS,
    receiver::{default_ladder, entrance, failed},
    store_file::{check_unused, read_store},
};

/// What a receiver with some settings would find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The store; none where it would be made.
    pub store: Option<StoreId>,
    /// How many disks have a directory in it.
    pub disks: usize,
}

/// Whether a receiver could start with these settings, as far as can be told without taking a place or opening a log: whether
/// the store is one, and certificates, the addresses in the clear and the default of what is kept can be used.
///
/// # Errors
/// What [`Receiver::start`](crate::Receiver::start) would say.
pub async fn look(config: &Config) -> Result<Found, StartError> {
    default_ladder(config)?;
    config.shared_uri().map_err(StartError::NbdUri)?;
    if let Some(tls) = &config.nbd_tls {
        let uri = config.nbd_listen.as_deref().unwrap_or("a socket of its own").to_owned();
        tls.check().map_err(|error| StartError::Nbd { uri, source: BindError::Tls(error) })?;
    }
    let entrance = entrance(config).await?;
    for address in config.listen_addresses() {
        entrance.check(&address).await?;
    }
    match std::fs::metadata(&config.store) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found { store: None, disks: 0 }),
        Ok(_) | Err(_) => look_at_store(&config.store),
    }
}

fn look_at_store(path: &Path) -> Result<Found, StartError> {
    let storage = RealStorage::open(path)
        .map_err(|source| failed(format!("open the store {}", path.display()), source))?;
    let storage: Arc<dyn Storage> = Arc::new(storage);
    let store = match read_store(&storage) {
        Ok(store) => Some(store),
        Err(StoreFileError::NoStore { .. }) => {
            check_unused(&storage)?;
            None
        }
        Err(error) => return Err(error.into()),
    };
    let disks = match storage.list(Path::new(DISKS)) {
        Ok(names) => names.iter().filter(|name| name.parse::<Uuid>().is_ok()).count(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(source) => {
            let path = storage.display(Path::new(DISKS));
            return Err(StoreFileError::Io { what: "list", path, source }.into());
        }
    };
    Ok(Found { store, disks })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ListenError, StreamTls, WhichDisks, store_file::open_store};

    #[tokio::test]
    async fn what_a_receiver_would_find_is_told_and_nothing_is_changed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let config = Config::new(&path);
        assert_eq!(look(&config).await.unwrap(), Found { store: None, disks: 0 });
        assert!(!path.exists(), "it only looks");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("lock"), "").unwrap();
        assert_eq!(look(&config).await.unwrap(), Found { store: None, disks: 0 });
        let foreign = path.join("holiday.jpg");
        std::fs::write(&foreign, "").unwrap();
        let error = look(&config).await.unwrap_err();
        assert!(matches!(error, StartError::Store(StoreFileError::NotAStore { .. })), "{error:?}");
        std::fs::remove_file(foreign).unwrap();
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 1, "it only looks");

        let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(&path).unwrap());
        let store = open_store(&storage).unwrap();
        for name in [Uuid::from_u128(1).to_string(), "lost+found".to_owned()] {
            std::fs::create_dir_all(path.join(DISKS).join(name)).unwrap();
        }
        assert_eq!(look(&config).await.unwrap(), Found { store: Some(store), disks: 1 });
        std::fs::write(path.join("store.json"), "{}").unwrap();
        let error = look(&config).await.unwrap_err();
        assert!(matches!(error, StartError::Store(StoreFileError::Damaged { .. })), "{error:?}");
    }

    #[tokio::test]
    async fn settings_that_cannot_be_used_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let config = Config::new(directory.path().join("store"));
        let listen = |address: &str| vec![address.parse().unwrap()];
        let certificates = directory.path().join("pki");

        let mut open = Config { listen: listen("tcp://0.0.0.0:9100"), ..config.clone() };
        let error = look(&open).await.unwrap_err();
        assert!(matches!(error, StartError::Listen(ListenError::Insecure(_))), "{error:?}");
        open.insecure = true;
        look(&open).await.unwrap();

        let mut secured = Config { listen: listen("tls://127.0.0.1:9100"), ..config.clone() };
        let error = look(&secured).await.unwrap_err();
        assert!(matches!(error, StartError::Listen(ListenError::NoCertificates(_))), "{error:?}");
        secured.stream_tls =
            Some(StreamTls { certificates: certificates.clone(), disks: WhichDisks::default() });
        let error = look(&secured).await.unwrap_err();
        assert!(matches!(error, StartError::Listen(ListenError::Tls(_))), "{error:?}");

        let nbd_tls =
            serde_json::from_value(serde_json::json!({"mode": "required", "certificates": certificates}));
        let mounts = Config { nbd_tls: Some(nbd_tls.unwrap()), ..config.clone() };
        let error = look(&mounts).await.unwrap_err();
        assert!(matches!(error, StartError::Nbd { source: BindError::Tls(_), .. }), "{error:?}");

        let exposed = Config { nbd_listen: Some("nbd://0.0.0.0:10809".to_owned()), ..config.clone() };
        assert!(matches!(look(&exposed).await.unwrap_err(), StartError::NbdUri(_)));

        let mut kept = config;
        kept.retention.default = "now and then".to_owned();
        assert!(matches!(look(&kept).await.unwrap_err(), StartError::Retention(_)));
    }
}
