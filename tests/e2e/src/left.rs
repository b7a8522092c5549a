//! What an agent leaves that is killed, as most of them are at the end of a test: the `qemu-nbd` it has started for a qcow2 file,
//! which the next agent would end.

use std::path::Path;

use crate::tools;

/// Ends every `qemu-nbd` whose pid file is in `directory`, and no other. Whoever started them must have ended.
pub(crate) fn end_servers_of(directory: &Path) {
    let Ok(processes) = std::fs::read_dir("/proc") else { return };
    let ids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let left: Vec<String> = ids.filter(|id| serves_in(*id, directory)).map(|id| id.to_string()).collect();
    if !left.is_empty() {
        // One of them may have ended meanwhile.
        let kill: Vec<&str> = ["-s", "KILL"].into_iter().chain(left.iter().map(String::as_str)).collect();
        tools::try_run("kill", &kill);
    }
}

/// Whether a process is such a server. It has written its pid file, or is about to: its arguments say which.
fn serves_in(id: u32, directory: &Path) -> bool {
    // One that has ended has none.
    let Ok(line) = std::fs::read(format!("/proc/{id}/cmdline")) else { return false };
    let Ok(line) = String::from_utf8(line) else { return false };
    let arguments: Vec<&str> = line.split('\0').collect();
    let is_server = Path::new(arguments[0]).file_name().is_some_and(|name| name == "qemu-nbd");
    let has_file = |pair: &[&str]| pair[0] == "--pid-file" && Path::new(pair[1]).starts_with(directory);
    is_server && arguments.windows(2).any(has_file)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use crate::{Bench, tools};

    #[test]
    fn a_server_that_a_killed_agent_leaves_ends_with_its_bench_and_no_other_does() {
        let (bench, other) = (Bench::new(), Bench::new());
        let serve = |bench: &Bench| {
            bench.image("a.img", 1 << 20);
            let (image, socket, pid) = (bench.name("a.img"), bench.name("a.sock"), bench.name("a.pid"));
            let arguments = ["-f", "raw", "-t", "-k", &socket, "--pid-file", &pid, &image];
            let server = tools::Beside::start("qemu-nbd", &arguments);
            tools::wait_for_socket(socket.as_ref());
            server
        };
        let (mut ends, mut stays) = (serve(&bench), serve(&other));
        drop(bench);
        let until = Instant::now() + Duration::from_secs(60);
        while ends.runs() {
            assert!(Instant::now() < until, "it is left");
            std::thread::yield_now();
        }
        assert!(stays.runs(), "it is another bench's");
    }
}
