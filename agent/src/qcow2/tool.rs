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
use crate::claims::Behind;

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

/// The files that a qcow2 file names as parts of its content: its backing files and its data file. None of a file that
/// `qemu-img` does not understand: whoever opens it as a disk is going to say why.
///
/// # Errors
/// When that does not come to an end.
pub(crate) async fn files_behind(image: &Path) -> Result<Vec<Behind>, Qcow2Error> {
    // Nothing is locked for that: others may have it open.
    let command = ["info", "--force-share", "--backing-chain", "--output=json", "-f", "qcow2"];
    match qemu_img(&command, image, &[]).await {
        Ok(chain) => Ok(behind(&chain)),
        Err(stuck @ Qcow2Error::Stuck { .. }) => Err(stuck),
        Err(_) => Ok(Vec::new()),
    }
}

/// The files behind the first image of a chain, as `qemu-img info` prints it.
fn behind(chain: &[u8]) -> Vec<Behind> {
    let chain: Vec<serde_json::Value> = serde_json::from_slice(chain).unwrap_or_default();
    let mut found = Vec::new();
    for (depth, image) in chain.iter().enumerate() {
        // A relative name of it QEMU takes from its own directory, not from where the image is: so `qemu-nbd` has this one's.
        let data = &image["format-specific"]["data"]["data-file"];
        add_file(data, depth == 0, &mut found);
        if depth > 0 {
            add_files(image, &mut found);
        }
    }
    found
}

/// An image that is only read, and the files that it consists of.
fn add_files(image: &serde_json::Value, found: &mut Vec<Behind>) {
    add_file(&image["filename"], false, found);
    for child in image["children"].as_array().into_iter().flatten() {
        add_files(&child["info"], found);
    }
}

fn add_file(name: &serde_json::Value, is_written: bool, found: &mut Vec<Behind>) {
    let Some(name) = name.as_str() else { return };
    // Of URIs and the like there is no file.
    let path = Path::new(name.strip_prefix("file:").unwrap_or(name)).to_owned();
    if found.iter().all(|other| other.path != path) {
        found.push(Behind { path, is_written });
    }
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

    #[test]
    fn the_files_behind_an_image_are_its_backing_files_and_its_data_file() {
        let chain = br#"[
            {"filename": "/d/top.qcow2", "format": "qcow2", "backing-filename": "middle.qcow2",
             "children": [{"name": "file", "info": {"filename": "/d/top.qcow2", "children": []}}],
             "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "data-file": "/d/top.raw"}}},
            {"filename": "/d/middle.qcow2", "format": "qcow2",
             "children": [{"name": "file", "info": {"filename": "/d/middle.qcow2", "children": []}}],
             "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "data-file": "/d/middle.raw"}}},
            {"filename": "json:{\"driver\": \"raw\"}", "format": "raw",
             "children": [{"name": "file", "info": {"filename": "file:/d/base.img", "children": []}}]}
        ]"#;
        let found = behind(chain);
        let of = |is_written: bool| {
            let some = found.iter().filter(move |behind| behind.is_written == is_written);
            some.map(|behind| behind.path.to_str().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(of(true), ["/d/top.raw"]);
        let read = of(false);
        assert!(!read.contains(&"/d/top.qcow2"), "{read:?}");
        for path in ["/d/middle.qcow2", "/d/middle.raw", "/d/base.img"] {
            assert!(read.contains(&path), "{path}: {read:?}");
        }
        assert_eq!(behind(b"no JSON"), []);
    }

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
