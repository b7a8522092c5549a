//! Certificates that are renewed wrongly, or lie where nobody answers: what is in use stays in use.

use backtide_e2e::{Bench, tools};

use crate::secured_stream::{LONG, address, attach, authority, folder, receiver};

/// What `doctor` says of certificates.
fn doctor(bench: &Bench, code: i32) -> Vec<String> {
    let report = bench.json_ending(code, &["doctor"]);
    let findings = report["findings"].as_array().expect("findings").clone();
    let of_streams = findings.iter().filter(|finding| finding["check"] == "streams");
    of_streams.map(|finding| finding["message"].as_str().expect("text").to_owned()).collect()
}

fn times(log: &str, what: &str) -> usize {
    // As JSON has it.
    let what = what.replace('"', "\\\"");
    log.lines().filter(|line| line.contains("WARN") && line.contains(&what)).count()
}

#[test]
fn an_expired_certificate_replaces_no_good_one_in_streams_disks_and_mounts() {
    let bench = Bench::new();
    let we = authority();
    let good = |name: &str| folder(&bench, name, &we, &we, LONG);
    let (theirs, ours, served, guests) = (good("receivers"), good("agents"), good("served"), good("guests"));
    let tls = ["--nbd-tls", "required", "--nbd-tls-certificates", &served];
    let receiver = receiver(&bench, &theirs, &[&["--tls-disks", "any"][..], &tls].concat());
    let agent = bench.daemon(&[&["agent", "run"][..], &tls].concat());
    let disk = attach(&bench, 0, "vm1", &address(&receiver, "tls://"), &ours);
    disk.wait("sync");
    let mount = bench.json(&["mount", "vm1", "--at", "latest"]);
    let as_guest = |uri: &str| uri.replace(&served, &guests);
    let works = || {
        bench.json(&["pause", "vm1"]);
        bench.json(&["resume", "vm1"]);
        disk.wait("sync");
        for uri in [disk.uri().as_str(), mount["uri"].as_str().expect("a URI")] {
            tools::run("nbdinfo", &[&as_guest(uri)]);
        }
    };
    works();
    assert_eq!(doctor(&bench, 0).len(), 2, "all is well");

    for name in ["receivers", "agents", "served"] {
        folder(&bench, name, &we, &we, 0);
    }
    works();
    works();
    let said = doctor(&bench, 3);
    for (name, whose) in [("receivers", "server"), ("agents", "client"), ("served", "server")] {
        let file = bench.path(name).join(format!("{whose}-cert.pem"));
        let what = format!(
            "in {file:?} has expired at 2021-01-01T00:00:00Z; put a certificate there that is valid now"
        );
        let found = said
            .iter()
            .filter(|said| said.contains(&what) && said.contains("the old ones stay in use until"));
        // Disks and mounts are served by two daemons.
        assert_eq!(found.count(), if name == "served" { 2 } else { 1 }, "{what}: {said:#?}");
        let logs = [("receivers", 1, 0), ("agents", 0, 1), ("served", 1, 1)];
        let (_, there, here) = logs.into_iter().find(|(of, ..)| *of == name).expect("listed");
        let in_logs = (times(&receiver.log(), &what), times(&agent.log(), &what));
        assert_eq!(in_logs, (there, here), "{name}: once in the log of who uses them");
    }
    for name in ["receivers", "agents", "served"] {
        folder(&bench, name, &we, &we, LONG);
    }
    works();
    assert_eq!(doctor(&bench, 0).len(), 2, "all is well again");
}

/// A pipe that nobody writes to is a file whose file system does not answer.
#[test]
fn certificates_that_nobody_answers_for_hold_up_no_disk() {
    let bench = Bench::new();
    let we = authority();
    let (theirs, ours) =
        (folder(&bench, "receivers", &we, &we, LONG), folder(&bench, "agents", &we, &we, LONG));
    let served = folder(&bench, "served", &we, &we, LONG);
    let guests = folder(&bench, "guests", &we, &we, LONG);
    let receiver = receiver(&bench, &theirs, &["--tls-disks", "any"]);
    let tls = ["--nbd-tls", "required", "--nbd-tls-certificates", &served];
    let agent = bench.daemon(&[&["agent", "run"][..], &tls].concat());
    let disk = attach(&bench, 0, "vm1", &address(&receiver, "tls://"), &ours);
    disk.wait("sync");
    let pipes = ["agents/client-key.pem", "served/server-key.pem", "receivers/server-key.pem"];
    for pipe in pipes {
        std::fs::remove_file(bench.path(pipe)).expect("remove");
        tools::run("mkfifo", &[&bench.name(pipe)]);
    }
    // A new client, a new stream, and what they do: with what was read before.
    bench.json(&["pause", "vm1"]);
    bench.json(&["resume", "vm1"]);
    let uri = disk.uri().replace(&served, &guests);
    tools::run("nbdcopy", &[&bench.name("vm1"), &uri]);
    disk.wait("sync");
    let said = doctor(&bench, 3);
    assert_eq!(said.iter().filter(|said| said.contains("has not answered for")).count(), 3, "{said:#?}");
    let silent = || times(&agent.log(), "has not answered for");
    // A look that had not lasted so long when it was used is told of with the next use.
    while silent() < 2 {
        bench.json(&["pause", "vm1"]);
        bench.json(&["resume", "vm1"]);
        disk.wait("sync");
    }
    assert_eq!(silent(), 2, "once each: {}", agent.log());
}
