//! What is around the daemons: their sockets and processes, the store's directory, programs.

use std::{
    io::ErrorKind,
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::SystemTime,
};

use backtide_control::Address;
use backtide_export::{NbdAddress, NbdUri};
use backtide_receiver_api::ReceiverStatus;
use backtide_units::CaptureTime;

use super::{Finding, Verdict};
use crate::open_files;

/// Now, by this machine's clock.
pub(super) fn now() -> CaptureTime {
    SystemTime::now().into()
}

/// Whether only its owner reaches a daemon's socket. Nothing where there is none.
pub(super) fn socket(name: &str, address: &Address) -> Option<Finding> {
    let path = address.socket_path()?;
    let found = std::fs::metadata(path).ok()?;
    if !found.file_type().is_socket() {
        let message = format!("{} of the {name} is no socket", path.display());
        return Some(
            Finding::new("sockets", Verdict::Failed, message).hint("remove it, and start the daemon"),
        );
    }
    let mode = found.mode() & 0o777;
    if mode & 0o077 != 0 {
        let message = format!("{} has mode {mode:03o}: others reach the {name}", path.display());
        return Some(
            Finding::new("sockets", Verdict::Failed, message).hint(format!("chmod 600 {}", path.display())),
        );
    }
    Some(Finding::ok("sockets", format!("only its owner reaches {}", path.display())))
}

/// The directory in `/proc` of whoever has the socket. One that is silent may be waited for without end.
fn process_of(address: &Address) -> Option<PathBuf> {
    let socket = UnixStream::connect(address.socket_path()?).ok()?;
    let id = rustix::net::sockopt::socket_peercred(&socket).ok()?.pid;
    Some(PathBuf::from(format!("/proc/{}", id.as_raw_nonzero())))
}

/// Whether it is a daemon of this machine that has the socket, and not what only leads to another machine, as ssh does.
pub(super) fn is_here(address: &Address) -> bool {
    let daemon = || {
        let program = std::fs::read_link(process_of(address)?.join("exe")).ok()?;
        let own = std::env::current_exe().ok()?;
        // One that was replaced since has more behind its name.
        let (program, own) =
            (program.file_name()?.to_str()?.to_owned(), own.file_name()?.to_str()?.to_owned());
        Some(program.split(' ').next() == own.split(' ').next())
    };
    daemon() == Some(true)
}

/// That the socket is gone at which something is served over NBD: who has it open goes on, and nobody else comes. Nothing
/// where it is no socket of this machine's, or is there.
pub(super) fn lost_socket(what: &str, uri: &str) -> Option<Finding> {
    let NbdAddress::Unix(path) = uri.parse::<NbdUri>().ok()?.address else { return None };
    let is_gone =
        |path: &Path| std::fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    // In a container of the daemon's there need not be its directory either.
    if !is_gone(&path) || path.parent().is_none_or(is_gone) {
        return None;
    }
    let message =
        format!("{what} is served at {}, and that is gone: nobody can connect again", path.display());
    let way = match what.starts_with("mount") || what.starts_with("every mount") {
        true => "unmount and mount it again, or start the daemon anew",
        false => "`backtide agent restart` makes it anew",
    };
    Some(Finding::new("sockets", Verdict::Failed, message).hint(way))
}

/// Whether a daemon may have enough files open. Nothing where that cannot be told.
pub(super) fn open_files(name: &str, address: &Address) -> Option<Finding> {
    let limits = std::fs::read_to_string(process_of(address)?.join("limits")).ok()?;
    let limit = open_files::soft_limit(&limits)?;
    let message = format!("the {name} may have {limit} files open");
    if limit >= open_files::ENOUGH {
        return Some(Finding::ok("open-files", message));
    }
    let hint = format!("raise the hard limit to {} or more (LimitNOFILE of a service)", open_files::ENOUGH);
    Some(Finding::new("open-files", Verdict::Warning, message).hint(hint))
}

/// Whether the store can be written, where it is on this machine.
pub(super) fn store(receiver: &ReceiverStatus) -> Option<Finding> {
    let path = Path::new(&receiver.store);
    if !path.is_dir() {
        return None;
    }
    match rustix::fs::access(path, rustix::fs::Access::WRITE_OK) {
        Ok(()) => Some(Finding::ok("store", format!("{} can be written", path.display()))),
        Err(error) => {
            let message = format!("{} cannot be written: {error}", path.display());
            Some(Finding::new("store", Verdict::Failed, message).hint("see how its file system is mounted"))
        }
    }
}

/// Whether a program is there; `why` says who needs it.
pub(super) fn program(name: &str, why: &str) -> Finding {
    match find(name) {
        Some(path) => Finding::ok("programs", format!("{name} is {}", path.display())),
        None => Finding::new("programs", Verdict::Warning, format!("{name} is not there: {why}")),
    }
}

/// Whether virtual machines can run here.
pub(super) fn qemu() -> Finding {
    let names = ["qemu-system-x86_64", "qemu-system-aarch64", "qemu-kvm"];
    match names.iter().find_map(|name| find(name)) {
        Some(path) => Finding::ok("programs", format!("QEMU is {}", path.display())),
        // Nothing of ours starts it: guests may run elsewhere.
        None => Finding::ok("programs", "QEMU is not there: only a host that runs guests needs it"),
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let usual = ["/usr/sbin", "/usr/libexec"].map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(usual).map(|place| place.join(program)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_is_gone_is_told_where_it_would_be() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1.nbd");
        let uri = |path: &Path| format!("nbd+unix:///vm1?socket={}", path.display());
        let lost = lost_socket("disk vm1", &uri(&path)).unwrap();
        assert_eq!(lost.verdict, Verdict::Failed);
        assert!(lost.message.starts_with(&format!("disk vm1 is served at {}", path.display())), "{lost:?}");
        assert!(lost.hint.unwrap().contains("agent restart"));
        assert!(lost_socket("mount vm1-2", &uri(&path)).unwrap().hint.unwrap().starts_with("unmount"));
        assert!(lost_socket("disk vm1", &uri(Path::new("/nowhere/vm1.nbd"))).is_none());
        assert!(lost_socket("disk vm1", "nbd://127.0.0.1:1/vm1").is_none());
        let _bound = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(lost_socket("disk vm1", &uri(&path)).is_none());
    }
}
