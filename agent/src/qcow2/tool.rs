//! What `qemu-img` does with a qcow2 file that nobody has open.
//!
//! Invariant: it takes a bounded time, whatever the storage does, and goes with whoever asked.

use std::{
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use backtide_units::ByteCount;
use tokio::process::Command;

use super::Qcow2Error;

/// How long it may take: it reads and writes tables, and no data.
const TOOL_MAX: Duration = Duration::from_secs(60);

/// Makes a qcow2 file that nobody has open longer.
pub(crate) async fn grow(image: &Path, size: ByteCount) -> Result<(), Qcow2Error> {
    qemu_img(&["resize", "-q", "-f", "qcow2"], image, &[&size.0.to_string()]).await.map(drop)
}

/// Makes a qcow2 file without data, in the place of whatever is there.
pub(crate) async fn create(image: &Path, size: ByteCount) -> Result<(), Qcow2Error> {
    qemu_img(&["create", "-q", "-f", "qcow2"], image, &[&size.0.to_string()]).await.map(drop)
}

/// Whether no byte of a qcow2 file was ever written, nor of another file behind it.
pub(crate) async fn is_blank(image: &Path) -> Result<bool, Qcow2Error> {
    let map = qemu_img(&["map", "-f", "qcow2", "--output=json"], image, &[]).await?;
    let stretches: Option<Vec<serde_json::Value>> = serde_json::from_slice(&map).ok();
    // What is not understood is somebody's.
    Ok(stretches.is_some_and(|all| all.iter().all(|stretch| stretch["data"] == false)))
}

/// What `qemu-img` prints of a file.
async fn qemu_img(command: &[&str], image: &Path, rest: &[&str]) -> Result<Vec<u8>, Qcow2Error> {
    let mut tool = Command::new("qemu-img");
    tool.args(command).arg(image).args(rest).stdin(Stdio::null());
    let output = output_of(tool, image).await?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(Qcow2Error::Refused { image: image.to_owned(), message })
}

async fn output_of(mut tool: Command, image: &Path) -> Result<Output, Qcow2Error> {
    // Who asked may be gone before it ends.
    let output = tool.kill_on_drop(true).output();
    match tokio::time::timeout(TOOL_MAX, output).await {
        Ok(output) => output.map_err(Qcow2Error::Start),
        Err(_) => Err(Qcow2Error::Stuck { image: image.to_owned(), after: TOOL_MAX }),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        os::{fd::OwnedFd, unix::net::UnixStream},
    };

    use super::*;

    #[tokio::test]
    async fn a_tool_that_stands_still_is_given_up_and_killed() {
        // It has the other end as long as it is there, and waits for what never comes.
        let (mut ours, input) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut tool = Command::new("sh");
        tool.args(["-c", "read never"]).stdin(Stdio::from(OwnedFd::from(input)));
        tokio::time::pause();
        let given_up = output_of(tool, Path::new("/vm1.qcow2")).await.unwrap_err();
        let said = given_up.to_string();
        assert!(said.contains("qemu-img has not ended with /vm1.qcow2 after 60 s"), "{said}");
        // Its end; a read by itself may be interrupted by the signal that tells of it.
        let ended = ours.read_to_end(&mut Vec::new());
        assert!(ended.is_ok(), "it is there still: {ended:?}");
    }
}
