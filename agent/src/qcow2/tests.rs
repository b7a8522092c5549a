//! What becomes of a server that ended, when its disk is let go of before there is another.

use std::{os::unix::fs::PermissionsExt, process::ExitStatus};

use super::*;

struct Bench {
    directory: tempfile::TempDir,
    opening: Opening,
}

impl Bench {
    /// Whose server is this script.
    fn new(script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let of = |name: &str| directory.path().join(name);
        let program = of("qemu-nbd");
        std::fs::write(&program, format!("#!/bin/sh\ncd {}\n{script}\n", directory.path().display()))
            .unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let disk = "vm1".parse().unwrap();
        let (image, socket) = (of("vm1.qcow2"), of("vm1.qemu-nbd"));
        let opening =
            Opening { program, image, disk, socket, cache: CacheMode::default(), access: Access::Disk };
        Self { directory, opening }
    }

    /// A server that has ended already.
    async fn ended(&self) -> Running {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().await.unwrap();
        Running { child, said: tokio::spawn(async { String::new() }), since: Instant::now() }
    }

    fn has(&self, name: &str) -> bool {
        self.directory.path().join(name).exists()
    }

    async fn until_there(&self, name: &str) {
        let there = async {
            while !self.has(name) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(120), there).await.expect("it begins");
    }

    /// What another start has left: a process that looks like its server, and its id.
    async fn left_behind(&self, first: &str) -> Child {
        let script = format!("cd {}\n{first}\n: > is-there\nread never", self.directory.path().display());
        let mut server = Command::new("sh");
        server.arg0("qemu-nbd").args(["-c", &script, "qemu-nbd"]).arg(&self.opening.socket);
        let child = server.stdin(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        self.until_there("is-there").await;
        std::fs::write(pid_file(&self.opening.socket), child.id().unwrap().to_string()).unwrap();
        child
    }
}

fn was_killed(status: ExitStatus) -> bool {
    std::os::unix::process::ExitStatusExt::signal(&status) == Some(9)
}

#[tokio::test]
async fn a_server_that_does_not_serve_yet_is_ended_when_its_disk_is_let_go_of() {
    let waits = "mkfifo never\n: > has-begun\nwhile :; do read nothing < never; done";
    let bench = Bench::new(&format!("trap ': > was-asked; exit' TERM\n{waits}"));
    let (stop, stopped) = oneshot::channel();
    let keeping = tokio::spawn(bench.opening.clone().keep(bench.ended().await, stopped));
    bench.until_there("has-begun").await;
    drop(stop);
    keeping.await.unwrap().unwrap();
    assert!(bench.has("was-asked"), "it is not left to itself, nor waited for until it serves");
}

#[tokio::test]
async fn what_another_start_has_left_is_ended_before_its_file_is_said_to_be_free() {
    let bench = Bench::new("exit 1");
    let mut left = bench.left_behind(":").await;
    let (stop, mut stopped) = oneshot::channel();
    drop(stop);
    let ended = bench.opening.start_again(&mut RESTART_LAST.clone(), &mut stopped).await;
    assert!(matches!(ended, ControlFlow::Break(Ok(()))), "{ended:?}");
    assert!(!was_killed(left.try_wait().unwrap().expect("it has ended")));
    assert!(!pid_file(&bench.opening.socket).exists());
}

#[tokio::test]
async fn one_that_does_not_end_is_known_to_the_next_start() {
    let bench = Bench::new("exit 1");
    let mut left = bench.left_behind("trap '' TERM").await;
    let at_once = Patience { asked: Duration::ZERO, killed: Duration::ZERO };
    // Nothing says how long the kernel takes to kill it.
    let ended = bench.opening.end_left(at_once).await;
    let is_known = pid_file(&bench.opening.socket).exists();
    assert_eq!(ended.is_err(), is_known, "{ended:?}");
    assert!(is_known || left.try_wait().unwrap().is_some(), "it has the file still, and nobody knows");
}
