//! The parsers, by what they read.

mod agent;
mod nbd;
mod store;
mod stream;
mod tables;
mod volumes;

use std::path::Path;

use backtide_storage::{MemoryStorage, Storage};
use backtide_units::ByteOffset;

pub use self::volumes::volume;
use crate::Target;

/// All of them.
pub fn all() -> Vec<Target> {
    let mut all = store::targets();
    all.extend(agent::targets());
    all.extend(stream::targets());
    all.extend(nbd::targets());
    all
}

/// The one of this name.
///
/// # Panics
/// When there is none.
pub fn named(name: &str) -> Target {
    all()
        .into_iter()
        .find(|target| target.name == name)
        .unwrap_or_else(|| panic!("there is no target {name}"))
}

/// A golden file.
fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/v1").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A storage with these files.
fn storage_with(files: &[(&Path, &[u8])]) -> MemoryStorage {
    let storage = MemoryStorage::new();
    for (path, content) in files {
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            storage.create_dir(dir).expect("a directory");
        }
        let file = storage.create_new(path).expect("a file");
        file.write_at(ByteOffset::ZERO, content).expect("its content");
    }
    storage
}

/// Checksums stay as they are.
fn leave(_: &mut [u8]) {}
