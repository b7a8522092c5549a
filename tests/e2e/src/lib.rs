//! The stage of the whole-system tests: real processes of `backtide` in a directory of their own,
//! and clients nobody here wrote to judge them.
//!
//! [`Bench`] is a directory with daemons in it, [`Disk`] an attached disk, [`Load`] a guest that
//! writes until it is told to stop and remembers in which order it was acknowledged, [`Model`] what
//! the disk must hold after each of those writes, [`tools`] the judges, [`kernel_disk`] a file system of the kernel on a disk,
//! [`FuseFile`] a file whose server tells what it hears, [`postgres`] a database on that, [`machine`] a virtual machine, [`ledger`] what it has acknowledged and when, [`wire`] the stream by hand,
//! [`nbd_wire`] a guest by hand, [`LoggedDisk`] a disk that writes down what it is asked for,
//! [`http`] a control API by hand, [`Relay`] a way that counts what comes back on it and can be slow. Every process that is started ends with its owner, also when a
//! test panics or is killed; what an agent has started and left ends with its [`Bench`], when no test is killed.
//!
//! Nothing here waits for a time to pass: waits are for a state, and last until it is there.

mod bench;
mod daemon;
mod disk;
mod fuse_file;
mod held;
pub mod http;
pub mod kernel_disk;
pub mod ledger;
mod left;
mod load;
mod loop_device;
pub mod machine;
mod model;
pub mod nbd_wire;
mod other_host;
pub mod postgres;
pub mod qmp;
mod relay;
mod request_log;
pub mod tools;
pub mod wire;

pub use bench::{Bench, Said};
pub use daemon::{Daemon, Doomed};
pub use disk::Disk;
pub use fuse_file::{FuseFile, Heard};
pub use held::{Held, Reconnecting};
pub use load::{Guest, Load, Returning, Written};
pub use loop_device::LoopDevice;
pub use model::{Model, Write, fill};
pub use other_host::OtherHost;
pub use relay::Relay;
pub use request_log::{LoggedDisk, Requests};

/// Says why a test does nothing on this machine, where the test's output shows it, and in the file that
/// `BACKTIDE_SKIPPED` names: whoever runs all of them is told which have proved nothing.
///
/// # Panics
/// When that file cannot be written.
pub fn skip(why: &str) {
    println!("SKIPPED: {why}");
    let Some(file) = std::env::var_os("BACKTIDE_SKIPPED") else { return };
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let mut file = std::fs::File::options()
        .append(true)
        .create(true)
        .open(file)
        .expect("open the list of skipped tests");
    std::io::Write::write_all(&mut file, format!("{test}: {why}\n").as_bytes()).expect("note a skipped test");
}

/// How often all kill points are gone through: as often as usual, or what `BACKTIDE_KILL_ROUNDS` says.
pub fn kill_rounds(usual: u64) -> u64 {
    let asked = std::env::var("BACKTIDE_KILL_ROUNDS").ok();
    asked.map_or(usual, |text| text.parse().expect("BACKTIDE_KILL_ROUNDS is a number"))
}

/// Whether this process is root's, who alone may mount.
pub fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("read /proc/self/status");
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).expect("a process has a user");
    uids.split_whitespace().nth(1) == Some("0")
}
