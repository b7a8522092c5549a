//! A file served through FUSE that goes around the page cache (`direct_io`), with what its server hears of it. Spoken by
//! hand: a server needs few of the messages for one file.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use crate::{Bench, bench::text, is_root, tools};

/// What the server heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Bytes were written at this offset.
    Write(u64),
    /// What was written has to be stable.
    Sync,
}

/// The file, until dropped.
pub struct FuseFile {
    path: PathBuf,
    heard: Arc<Mutex<Vec<Heard>>>,
}

impl FuseFile {
    /// One of `size` zeroes, called `name` in the bench's directory.
    ///
    /// # Errors
    /// Why there is none on this machine.
    pub fn start(bench: &Bench, name: &str, size: usize) -> Result<Self, String> {
        if !is_root() {
            return Err("only root mounts a file system".to_owned());
        }
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.map_err(|error| format!("no /dev/fuse: {error}"))?;
        let path = bench.path(name);
        std::fs::write(&path, "").expect("create a file to mount on");
        let stdin = device.try_clone().expect("a descriptor");
        let options = "fd=0,rootmode=100000,user_id=0,group_id=0";
        let mut mount = Command::new("mount");
        mount.args(["-i", "-t", "fuse", "-o", options, "backtide-test", &text(&path)]);
        let mounted = mount.stdin(Stdio::from(stdin)).output().expect("run mount");
        if !mounted.status.success() {
            return Err(format!("no FUSE here: {}", String::from_utf8_lossy(&mounted.stderr)));
        }
        let heard = Arc::<Mutex<Vec<Heard>>>::default();
        let server = Server { device, content: vec![0; size], heard: Arc::clone(&heard) };
        std::thread::spawn(move || server.serve());
        Ok(Self { path, heard })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the server has heard since this was asked last.
    pub fn heard(&self) -> Vec<Heard> {
        std::mem::take(&mut *self.heard.lock().expect("no panic"))
    }
}

impl Drop for FuseFile {
    fn drop(&mut self) {
        tools::try_run("umount", &["-l", &text(&self.path)]);
    }
}

struct Server {
    device: File,
    content: Vec<u8>,
    heard: Arc<Mutex<Vec<Heard>>>,
}

/// The messages that are understood; the kernel does without the others.
mod message {
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const BATCH_FORGET: u32 = 42;
}

/// Bytes of a message's head.
const HEAD: usize = 40;

/// `FOPEN_DIRECT_IO`.
const DIRECT_IO: u32 = 1;

/// `ENOSYS`: not understood.
const NOT_UNDERSTOOD: i32 = -38;

/// The numbers as they lie in memory, one after the other.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

impl Server {
    /// Until it is unmounted.
    fn serve(mut self) {
        let mut buffer = vec![0; 1 << 20];
        while let Ok(length @ HEAD..) = self.device.read(&mut buffer) {
            let (head, body) = buffer[..length].split_at(HEAD);
            let number = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().expect("four bytes"));
            let kind = number(4);
            if matches!(kind, message::FORGET | message::BATCH_FORGET | message::INTERRUPT) {
                continue;
            }
            let (error, data) = match self.answer(kind, body) {
                Some(data) => (0, data),
                None => (NOT_UNDERSTOOD, Vec::new()),
            };
            let mut reply = words(&[(16 + data.len()) as u32, error.cast_unsigned()]);
            reply.extend_from_slice(&head[8..16]);
            reply.extend(data);
            if self.device.write_all(&reply).is_err_and(|error| error.kind() != io::ErrorKind::NotFound) {
                return;
            }
        }
    }

    fn answer(&mut self, kind: u32, body: &[u8]) -> Option<Vec<u8>> {
        let number = |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().expect("four bytes"));
        let offset = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().expect("eight bytes"));
        Some(match kind {
            // Version 7.31, nothing read ahead, no abilities, writes of up to 128 KiB.
            message::INIT => {
                let mut init = words(&[7, 31, 0, 0, 16 | 12 << 16, 128 << 10, 1, 0]);
                init.resize(64, 0);
                init
            }
            message::GETATTR => self.attributes(),
            message::OPEN => words(&[1, 0, DIRECT_IO, 0]),
            message::READ => {
                let (at, length) = (offset(8) as usize, number(16) as usize);
                let end = (at + length).min(self.content.len());
                self.content[at.min(end)..end].to_vec()
            }
            message::WRITE => {
                let (at, length) = (offset(8), number(16));
                self.content[at as usize..][..length as usize].copy_from_slice(&body[40..]);
                self.heard.lock().expect("no panic").push(Heard::Write(at));
                words(&[length, 0])
            }
            message::FSYNC => {
                self.heard.lock().expect("no panic").push(Heard::Sync);
                Vec::new()
            }
            message::STATFS => {
                let mut found = vec![0; 40];
                found.extend(words(&[4096, 255, 4096, 0]));
                found.resize(80, 0);
                found
            }
            message::RELEASE | message::FLUSH => Vec::new(),
            _ => return None,
        })
    }

    /// A regular file, of root, for root.
    fn attributes(&self) -> Vec<u8> {
        let size = self.content.len() as u64;
        // For how long they hold: not at all.
        let mut found = words(&[0; 4]);
        for number in [1, size, size / 512, 0, 0, 0] {
            found.extend(u64::to_ne_bytes(number));
        }
        found.extend(words(&[0, 0, 0, 0o100_600, 1, 0, 0, 0, 4096, 0]));
        found
    }
}
