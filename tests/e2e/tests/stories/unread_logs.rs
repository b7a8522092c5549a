//! Nobody takes what the daemons log: they go on, and nothing waits.

use std::{fs::File, io::Read};

use backtide_e2e::{Bench, Daemon, tools};

const SIZE: u64 = 16 << 20;

/// A daemon whose stderr is what the shell makes of `redirection`, and which has much to tell.
fn daemon(bench: &Bench, redirection: &str, arguments: &[&str]) -> Daemon {
    let script = format!("RUST_LOG=debug exec \"$@\" {redirection}");
    bench.daemon_under(&["sh", "-c", &script, "sh"], arguments)
}

/// A disk's life while nobody takes the logs of its daemons.
fn lives(bench: &Bench, redirection: &str, hold: &[&str], rounds: u8, look: impl FnOnce()) {
    let receiver = daemon(bench, redirection, &["receiver", "run"]);
    let agent = daemon(bench, redirection, &[&["agent", "run"], hold].concat());
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.settle();
    for round in 1..=rounds {
        bench.json(&["pause", "vm1"]);
        disk.qemu_io(&[&format!("write -P {round} 0 64k")]);
        bench.json(&["resume", "vm1"]);
    }
    disk.settle();
    if !hold.is_empty() {
        bench.json(&["agent", "restart"]);
        disk.settle();
    }
    look();
    disk.latest_is_the_image();
    bench.json(&["detach", "vm1"]);
    assert_eq!((agent.stop(), receiver.stop()), (0, 0));
}

#[test]
fn a_log_on_a_full_file_system_ends_nobody() {
    lives(&Bench::new(), "2>/dev/full", &[], 3, || ());
}

#[test]
fn a_log_on_a_full_file_system_ends_no_holder() {
    lives(&Bench::new(), "2>/dev/full", &["--hold"], 3, || ());
}

#[test]
fn a_log_that_nobody_reads_holds_up_nobody() {
    let bench = Bench::new();
    let fifo = bench.name("log");
    tools::run("mkfifo", &[&fifo]);
    // What a pipe of 16 pages holds at least when it takes no more; it waits until there is so much.
    let is_full = || File::open(&fifo).unwrap().read_exact(&mut [0; 24_000]).unwrap();
    lives(&bench, &format!("2<>{fifo}"), &[], 90, is_full);
}
