//! The judges: programs others wrote, which speak NBD and know disk images.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

use crate::bench::text;

/// Runs a program that must succeed; what it printed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let (success, said) = try_run(program, arguments);
    assert!(success, "{program} {arguments:?}: {said}");
    said
}

/// Runs a program: whether it succeeded, and what it printed.
pub fn try_run(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("run {program}, see tests/run for its package: {error}"));
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// Sends a signal, such as `STOP`, which is waited for: `kill` answers while the threads of the
/// process still run, and one of them may yet do what the test says that nobody does.
pub fn signal(process: u32, name: &str) {
    run("kill", &["-s", name, &process.to_string()]);
    while name == "STOP" && !is_stopped(process) {
        std::thread::yield_now();
    }
}

/// Whether a signal has stopped a process, with all its threads.
pub fn is_stopped(process: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).expect("a process that lives");
    threads.flatten().all(|thread| match std::fs::read_to_string(thread.path().join("stat")) {
        // Behind the name, which may hold anything; of threads that ended nothing more is to be awaited.
        Ok(stat) => stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['T', 'Z', 'X'])),
        Err(_) => true,
    })
}

/// Whether a program is there.
pub fn is_there(program: &str) -> bool {
    Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output()
        .is_ok_and(|o| o.status.success())
}

/// Does steps of qemu-io on an export or image; reads with a pattern are checked.
pub fn qemu_io(target: &str, steps: &[&str]) {
    let mut arguments = vec!["-f", "raw", target];
    arguments.extend(steps.iter().flat_map(|step| ["-c", step]));
    let said = run("qemu-io", &arguments);
    assert!(!said.contains("failed"), "{steps:?} on {target}: {said}");
}

/// Two raw images hold the same, as qemu-img sees it.
pub fn assert_same_images(one: &Path, other: &Path) {
    let size = |path: &Path| std::fs::metadata(path).expect("look at an image").len();
    assert_eq!(size(one), size(other), "the sizes of {} and {}", one.display(), other.display());
    assert_same(&text(one), &text(other));
}

/// Two raw images, each a path or a URI, hold the same.
pub fn assert_same(one: &str, other: &str) {
    let (same, said) = try_run("qemu-img", &["compare", "-f", "raw", "-F", "raw", one, other]);
    assert!(same, "{one} and {other}: {said}");
}

/// Arguments of fio for a job of random 4 KiB writes through its nbd engine, each verified by its
/// CRC32C at the end.
pub fn fio_verified(uri: &str, bytes: u64, rate_iops: u64) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=guest", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16"]).args([
        // One process, so that whoever ends it ends its requests.
        "--thread".to_owned(),
        "--verify=crc32c".to_owned(),
        "--verify_fatal=1".to_owned(),
        "--verify_state_save=0".to_owned(),
        "--output-format=terse".to_owned(),
        format!("--uri={uri}"),
        format!("--size={bytes}"),
        format!("--rate_iops={rate_iops}"),
    ]);
    command
}

/// A program that runs beside the test and ends with it.
pub struct Beside(Child);

impl Beside {
    /// Starts it; it dies with the thread that started it.
    pub fn start(program: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", program]).args(arguments);
        Self::spawn(command)
    }

    /// Starts what must end in good order, see [`Self::succeed`].
    pub fn spawn(mut command: Command) -> Self {
        let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(piped.spawn().unwrap_or_else(|error| panic!("run {command:?}: {error}")))
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.0.try_wait().expect("wait for a program").is_none()
    }

    /// Waits for its end, which must be a success; what it printed.
    pub fn succeed(mut self) -> String {
        let said = self.said();
        let status = self.0.wait().expect("wait for a program");
        assert!(status.success(), "{status}: {said}");
        said
    }

    /// All that it prints, until it ends.
    pub fn said(&mut self) -> String {
        use std::io::Read;
        let mut said = String::new();
        for pipe in [
            self.0.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn Read>),
            self.0.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn Read>),
        ] {
            pipe.expect("a pipe").read_to_string(&mut said).expect("read what a program prints");
        }
        said
    }

    /// Sends it a signal, such as `STOP`.
    pub fn signal(&self, name: &str) {
        signal(self.0.id(), name);
    }

    /// Kills it.
    pub fn kill(mut self) {
        self.0.kill().expect("kill a program");
        self.0.wait().expect("wait for a program");
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until a socket is there: programs that serve one say nothing else when they are ready.
pub fn wait_for_socket(path: &Path) {
    while std::os::unix::net::UnixStream::connect(path).is_err() {
        std::thread::yield_now();
    }
}
