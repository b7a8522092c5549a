//! The agent is restarted, or dies, under a running guest: the guest sees a pause and nothing else.

use backtide_e2e::{Bench, Daemon, Disk, Held, Load, Reconnecting};

const SIZE: u64 = 16 << 20;

/// Says how long the guest waited at most; the figure of an optimized build is in docs/performance.md.
fn tell(what: &str, slowest: std::time::Duration) {
    println!("{what}: the guest's slowest request took {slowest:?}");
}

/// Timelines have holes only where the receiver had not acknowledged everything within the moment that
/// a handover waits for it, which the log tells.
fn assert_holes_are_told(disk: &Disk<'_>, agent: &Daemon) {
    let (log, holes) = (agent.log(), disk.holes());
    let ends = log.lines().filter(|line| line.contains("\"disk detached\""));
    let cut_off = ends.filter(|line| !line.contains("\"dirty_blocks\":\"0\"")).count();
    assert!(holes.len() <= cut_off, "{cut_off} handovers before everything was acknowledged: {holes:?}");
}

#[test]
fn a_restart_under_load_is_a_pause_without_a_hole() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    let before = disk.last();
    let guest = Reconnecting::before(&bench, "vm1", &bench.path("vm1.nbd"));
    let load = Load::start(&guest.uri, 1);
    load.goes_on(100);
    let process = agent.id();
    for _ in 0..3 {
        let instance = bench.json(&["status"])["instance"].clone();
        let restarted = bench.json(&["agent", "restart"]);
        assert_eq!(restarted["disks"], 1, "{restarted}");
        assert_ne!(bench.json(&["status"])["instance"], instance);
        load.goes_on(100);
    }
    let written = load.stop();
    tell("restart", written.slowest);
    assert_eq!(agent.id(), process);
    disk.latest_is_the_image();
    assert_holes_are_told(&disk, &agent);
    assert_eq!(disk.status()["epoch"], 4);
    // A write that was under way came again: the last point is what the guest wrote, all of it.
    written.model().assert_is_in(&disk.restore("latest"), written.writes.len(), "latest");
    assert!(disk.last() >= before + written.writes.len() as u64);
    assert_eq!(agent.stop(), 0);
    assert!(
        !bench.path("vm1.nbd").exists() && !bench.path("agent.sock").exists(),
        "files of sockets are left"
    );
}

#[test]
fn a_restart_with_the_receiver_away_loses_nothing() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    let guest = Reconnecting::before(&bench, "vm1", &bench.path("vm1.nbd"));
    let load = Load::start(&guest.uri, 1);
    load.goes_on(100);
    receiver.kill();
    load.goes_on(100);
    bench.json(&["agent", "restart"]);
    load.goes_on(100);
    let _receiver = bench.receiver();
    bench.json(&["agent", "restart"]);
    load.goes_on(100);
    let written = load.stop();
    disk.latest_is_the_image();
    written.model().assert_is_in(&disk.restore("latest"), written.writes.len(), "latest");
    assert_holes_are_told(&disk, &agent);
}

#[test]
fn a_killed_agent_is_started_again_behind_its_guest() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    let held = Held::dying(&bench);
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    let guest = Reconnecting::before(&bench, "vm1", &bench.path("vm1.nbd"));
    let load = Load::start(&guest.uri, 1);
    for _ in 0..2 {
        load.goes_on(100);
        held.kill_agent();
    }
    load.goes_on(100);
    // A disk that was attached at run time is kept like the others, and one that is gone is not.
    bench.image("vm2.img", SIZE);
    let other = bench.attach("vm2", "vm2.img", &[]);
    bench.json(&["detach", "vm2"]);
    assert!(!bench.path("vm2.nbd").exists());
    bench.attach("vm2", "vm2.img", &[]);
    held.kill_agent();
    load.goes_on(100);
    let written = load.stop();
    tell("kill -9", written.slowest);
    disk.latest_is_the_image();
    other.latest_is_the_image();
    written.model().assert_is_in(&disk.restore("latest"), written.writes.len(), "latest");
    assert_eq!(held.stop(), 0);
    let left: Vec<String> = ["vm1.nbd", "vm2.nbd", "agent.sock"]
        .into_iter()
        .filter(|name| bench.path(name).exists())
        .map(str::to_owned)
        .collect();
    assert_eq!(left, Vec::<String>::new(), "files of sockets are left");
}

#[test]
fn an_agent_that_dies_at_any_step_of_a_restart_costs_a_pause() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    let held = Held::dying(&bench);
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    let guest = Reconnecting::before(&bench, "vm1", &bench.path("vm1.nbd"));
    let load = Load::start(&guest.uri, 1);
    let steps =
        ["the agent restarts", "the stream to the receiver has ended", "disk detached", "agent hands over"];
    for step in steps.into_iter().chain(["disk attached", "agent started"]) {
        load.goes_on(50);
        let log = || held.holder().log().matches(step).count();
        let reached = log();
        let mut restart = bench.command(&["agent", "restart"]).spawn().unwrap();
        while log() == reached {
            std::thread::yield_now();
        }
        held.kill_agent();
        // It may have seen the end of the agent it asked, or the start of another.
        restart.wait().unwrap();
    }
    load.goes_on(100);
    let written = load.stop();
    disk.latest_is_the_image();
    written.model().assert_is_in(&disk.restore("latest"), written.writes.len(), "latest");
    assert_eq!(held.stop(), 0);
}

#[test]
fn an_agent_that_cannot_be_started_again_for_a_while_is_waited_for() {
    let bench = Bench::new();
    // A program of its own, which is away for a moment, as in an upgrade.
    let (own, away) = (bench.path("own"), bench.path("away"));
    let script = format!(
        "{{ ln \"$4\" {own} || cp \"$4\" {own}; }} && shift 4 && exec setpriv --pdeathsig KILL {own} \"$@\"",
        own = own.display()
    );
    let holder = bench.daemon_under(&["sh", "-c", &script, "sh"], &["agent", "run", "--hold"]);
    let mut held = Held { holder: Some(holder) };
    let holder = held.holder.as_mut().unwrap();
    holder.may_complain("the agent has died");
    holder.may_complain("the agent cannot be started");
    let instance = bench.json(&["status"])["instance"].clone();
    std::fs::rename(&own, &away).unwrap();
    held.kill_agent();
    while !held.holder().log().contains("the agent cannot be started") {
        std::thread::yield_now();
    }
    std::fs::rename(&away, &own).unwrap();
    assert_ne!(bench.json(&["status"])["instance"], instance, "at the socket that was kept");
    assert_eq!(held.stop(), 0);
}

#[test]
fn two_agents_never_serve_one_disk() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    let guest = Reconnecting::before(&bench, "vm1", &bench.path("vm1.nbd"));
    let load = Load::start(&guest.uri, 1);
    load.goes_on(50);
    // The same state, and another state with the same image: both are told so.
    for arguments in [vec!["agent", "run"], vec!["agent", "run", "--hold"]] {
        let said = bench.run(&arguments);
        assert_eq!((said.code, said.error()["code"].as_str()), (5, Some("locked")), "{said:?}");
    }
    let (other, api) = (bench.name("other"), bench.socket("other/agent.sock"));
    let _other = bench.daemon(&["--agent", &api, "agent", "run", "--state", &other]);
    let stream = bench.socket("stream.sock");
    let attach = ["--agent", &api, "attach", "vm1", &disk.image, "--receiver", &stream];
    let said = bench.run(&attach);
    assert_eq!((said.code, said.error()["code"].as_str()), (5, Some("locked")), "{said:?}");
    // Restarts that overlap are one or several, one after the other.
    let restarts: Vec<_> =
        (0..3).map(|_| bench.command(&["--json", "agent", "restart"]).spawn().unwrap()).collect();
    for mut restart in restarts {
        // One whose agent became another before it was answered does not know whose doing that was.
        let code = restart.wait().unwrap().code();
        assert!(matches!(code, Some(0 | 5 | 6)), "{code:?}");
        assert_eq!(bench.run(&attach).code, 5, "the image is locked again before anybody is answered");
    }
    load.goes_on(50);
    let written = load.stop();
    disk.latest_is_the_image();
    assert_holes_are_told(&disk, &agent);
    written.model().assert_is_in(&disk.restore("latest"), written.writes.len(), "latest");
    assert_eq!(agent.stop(), 0);
}

#[test]
fn a_program_that_cannot_follow_changes_nothing() {
    let bench = Bench::new();
    let config = bench.path("agent.toml");
    std::fs::write(&config, "").unwrap();
    let _receiver = bench.receiver();
    let agent = bench.daemon(&["agent", "run", "--config", config.to_str().unwrap()]);
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    let load = disk.load(1);
    load.goes_on(50);
    let instance = bench.json(&["status"])["instance"].clone();
    std::fs::write(&config, "no-such-setting = 1\n").unwrap();
    let said = bench.run(&["agent", "restart"]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.sentence().contains("no-such-setting"), "{said:?}");
    load.goes_on(50);
    load.stop();
    assert_eq!(bench.json(&["status"])["instance"], instance);
    assert_eq!(agent.stop(), 0);
}

#[test]
fn an_agent_inside_of_another_command_is_not_restarted() {
    let bench = Bench::new();
    bench.image("vm1.img", SIZE);
    let directory = bench.name("dir");
    let up = bench.daemon(&["up", &bench.name("vm1.img"), "--dir", &directory]);
    let api = up.ready["agent"].as_str().unwrap().to_owned();
    let said = bench.run(&["--agent", &api, "agent", "restart"]);
    assert_eq!((said.code, said.error()["code"].as_str()), (5, Some("refused")), "{said:?}");
    assert_eq!(up.stop(), 0);
}
