//! Streams under TLS: set up by two commands, refused in one sentence on either side, renewed under
//! way.

use std::time::{Duration, SystemTime};

use backtide_e2e::{Bench, Daemon, Disk, tools};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::Value;

const SIZE: u64 = 64 << 20;

/// A receiver's address for agents, by the name its certificate is for.
pub(crate) fn address(receiver: &Daemon, scheme: &str) -> String {
    let listen = receiver.ready["listen"].as_array().expect("addresses");
    let find = |listen: &&Value| listen.as_str().is_some_and(|at| at.starts_with(scheme));
    let found = listen.iter().find(find).and_then(Value::as_str).expect("an address");
    let (_, port) = found.rsplit_once(':').expect("a port");
    format!("{scheme}localhost:{port}")
}

pub(crate) fn receiver(bench: &Bench, certificates: &str, options: &[&str]) -> Daemon {
    let run = ["receiver", "run", "--listen", "tls://127.0.0.1:0,tcp://127.0.0.1:0", "--tls-certificates"];
    bench.daemon(&[&run[..], &[certificates], options].concat())
}

/// Attaches `name`, which is going to be connected when `code` is 0.
pub(crate) fn attach<'b>(
    bench: &'b Bench,
    code: i32,
    name: &str,
    receiver: &str,
    certificates: &str,
) -> Disk<'b> {
    let image = bench.image(name, SIZE);
    let image = image.to_str().expect("text");
    let arguments = ["attach", name, image, "--receiver", receiver];
    let tls = ["--tls-certificates", certificates];
    let tls = if certificates.is_empty() { &[][..] } else { &tls[..] };
    bench.json_ending(code, &[&arguments, tls].concat());
    bench.disk(name)
}

pub(crate) type Authority = CertifiedIssuer<'static, KeyPair>;

/// An authority as somebody else makes it.
pub(crate) fn authority() -> Authority {
    let mut params = CertificateParams::new(vec![]).expect("an authority has no name");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("sign")
}

/// When a certificate ends, in days from now.
pub(crate) const LONG: u64 = 300;

/// A folder with certificates of both sides, of years ago and until `days` from now, signed by one
/// authority, that trusts another.
pub(crate) fn folder(
    bench: &Bench,
    name: &str,
    signed: &Authority,
    trusted: &Authority,
    days: u64,
) -> String {
    let folder = bench.path(name);
    std::fs::create_dir_all(&folder).expect("make a directory");
    std::fs::write(folder.join("ca-cert.pem"), trusted.pem()).expect("write");
    for (whose, host) in [("server", "localhost"), ("client", "kvm-3")] {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![host.to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, host);
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = match days {
            0 => rcgen::date_time_ymd(2021, 1, 1),
            _ => (SystemTime::now() + Duration::from_secs(days * 24 * 3600)).into(),
        };
        let certificate = params.signed_by(&key, signed).expect("sign");
        std::fs::write(folder.join(format!("{whose}-cert.pem")), certificate.pem()).expect("write");
        std::fs::write(folder.join(format!("{whose}-key.pem")), key.serialize_pem()).expect("write");
    }
    bench.name(name)
}

#[test]
fn two_commands_make_a_stream_that_nobody_else_reads_or_writes() {
    let bench = Bench::new();
    let pki = bench.name("pki");
    let made = bench.json(&["pki", "init", &pki, "--receiver", "localhost"]);
    let server = made["certificates"].as_str().expect("a folder");
    let made = bench.json(&["pki", "issue", &pki, "kvm-3", "--disk", "vm1", "--disk", "db-*"]);
    let client = made["certificates"].as_str().expect("a folder");
    let receiver = receiver(&bench, server, &[]);
    let _agent = bench.agent();
    let at = address(&receiver, "tls://");
    let disk = attach(&bench, 0, "vm1", &at, client);
    disk.wait("sync");
    tools::run("qemu-io", &["-f", "raw", &disk.uri(), "-c", "write -P 0x5a 3M 20M", "-c", "flush"]);
    disk.settle();
    tools::assert_same(&bench.name("vm1"), disk.restore("latest").to_str().expect("text"));
    let tls = &disk.status()["stream_tls"];
    assert_eq!((&tls["subject"], &tls["receiver"]), (&"kvm-3".into(), &"localhost".into()));
    assert_eq!(tls["warnings"], serde_json::json!([]));

    // The certificate is for some disks, whatever else its owner knows of another.
    attach(&bench, 0, "db-7", &at, client).wait("sync");
    let other = attach(&bench, 3, "web", &at, client).status();
    assert_eq!(other["last_error"]["code"], "denied");
    let said = "the certificate of kvm-3 speaks for vm1, db-*, not for disk web";
    assert_eq!(other["last_error"]["message"], said);
    // An authority that exists is not made anew.
    let said = bench.run(&["pki", "init", &pki]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.sentence().contains("ca-key.pem"), "{said:?}");
}

#[test]
fn who_is_refused_is_told_why_in_one_sentence_on_both_sides() {
    let bench = Bench::new();
    let (we, they) = (authority(), authority());
    let ours = folder(&bench, "ours", &we, &we, LONG);
    let theirs = folder(&bench, "theirs", &they, &they, LONG);
    let mixed = folder(&bench, "mixed", &they, &we, LONG);
    let expired = folder(&bench, "expired", &we, &we, 0);
    let good = receiver(&bench, &ours, &[]);
    let _agent = bench.agent();
    let (tls, tcp) = (address(&good, "tls://"), address(&good, "tcp://"));
    let (clear, crypted) = (tls.replace("tls://", "tcp://"), tcp.replace("tcp://", "tls://"));
    for (disk, at, certificates, code, here, there) in [
        (
            "strange-receiver",
            &tls,
            theirs.as_str(),
            "tls",
            "is not trusted: its certificate is not signed",
            "does not accept this receiver's certificate",
        ),
        (
            "strange-agent",
            &tls,
            mixed.as_str(),
            "tls",
            "its authorities have not signed it",
            "its certificate is not signed",
        ),
        ("expired-agent", &tls, expired.as_str(), "tls", "it has expired", "its certificate has expired"),
        ("in-the-clear", &clear, "", "denied", "write tls:// instead of tcp://", "came in the clear"),
        ("too-secret", &crypted, ours.as_str(), "tls", "does not speak TLS there", "it speaks TLS"),
    ] {
        let status = attach(&bench, 3, disk, at, certificates).status();
        let error = &status["last_error"];
        assert_eq!(error["code"], code, "{disk}: {error}");
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains(here) && !message.contains('\n'), "{disk}: {message}");
        // The receiver may find out after the agent.
        bench.disk(disk).until("the receiver says so, too", |_| good.log().contains(there));
        // It goes on trying, and the log is not filled with it.
        let tried =
            |log: &str| log.lines().filter(|line| line.contains(there) && line.contains("WARN")).count();
        assert_eq!(tried(&good.log()), 1, "{disk}: {}", good.log());
        // The guest has its disk all the same.
        tools::run("qemu-io", &["-f", "raw", status["nbd_uri"].as_str().expect("a URI"), "-c", "write 0 4k"]);
        bench.json_ending(3, &["detach", disk]);
    }
    // A name that the certificate is not for, and one that it is told to be for.
    let named = tls.replace("localhost", "127.0.0.1");
    let status = attach(&bench, 3, "wrong-name", &named, &ours).status();
    let message = status["last_error"]["message"].as_str().expect("a message").to_owned();
    assert!(message.contains("its certificate is for localhost and not for 127.0.0.1"), "{message}");
    bench.image("right-name", SIZE);
    let image = bench.name("right-name");
    let attach = ["attach", "right-name", &image, "--receiver", &named, "--tls-certificates", &ours];
    bench.json(&[&attach[..], &["--tls-hostname", "localhost"]].concat());
    // What cannot work at all is refused at once.
    for certificates in [&[][..], &["--tls-certificates", "/nowhere"]] {
        let said = bench.run(&[&["attach", "x", &image, "--receiver", &tls], certificates].concat());
        assert_eq!(said.code, 2, "{said:?}");
        assert!(
            said.sentence().contains("certificates") || said.sentence().contains("/nowhere/"),
            "{said:?}"
        );
    }
    drop(good);
    let late = receiver(&bench, &expired, &[]);
    let at = address(&late, "tls://");
    let status = self::attach(&bench, 3, "expired-receiver", &at, &ours).status();
    let message = status["last_error"]["message"].as_str().expect("a message").to_owned();
    assert!(message.ends_with("is not trusted: its certificate has expired"), "{message}");
}

#[test]
fn certificates_are_renewed_without_losing_a_stream_and_their_end_is_announced() {
    let bench = Bench::new();
    let we = authority();
    let theirs = folder(&bench, "receivers", &we, &we, LONG);
    let ours = folder(&bench, "agents", &we, &we, LONG);
    let receiver = receiver(&bench, &theirs, &["--tls-disks", "any"]);
    let _agent = bench.agent();
    let disk = attach(&bench, 0, "vm1", &address(&receiver, "tls://"), &ours);
    disk.wait("sync");
    let first = disk.status()["stream_tls"]["receiver_not_after"].clone();
    let doctor = |code| {
        let report = bench.json_ending(code, &["doctor"]);
        let findings = report["findings"].as_array().expect("findings").clone();
        let texts = findings.iter().filter(|finding| finding["check"] == "streams");
        texts
            .map(|finding| finding["message"].as_str().expect("text").to_owned())
            .collect::<Vec<_>>()
            .join("\n")
    };
    let said = doctor(0);
    assert!(said.contains("1 stream under TLS") && said.contains("valid until"), "{said}");

    // Both sides are given new ones that end soon.
    folder(&bench, "receivers", &we, &we, 20);
    folder(&bench, "agents", &we, &we, 5);
    tools::run("qemu-io", &["-f", "raw", &disk.uri(), "-c", "write -P 1 0 1M", "-c", "flush"]);
    disk.settle();
    let status = disk.status();
    assert_eq!(status["counters"]["disconnects"], 0, "{status}");
    assert_eq!(status["stream_tls"]["receiver_not_after"], first, "the stream is the one that was there");
    let said = doctor(3);
    let localhost = "the certificate of localhost (";
    assert!(said.contains("the certificate of kvm-3 (") && said.contains(localhost), "{said}");
    let alarms = bench.json_ending(3, &["receiver", "status"])["alarms"].to_string();
    assert!(alarms.contains("server-cert.pem) expires in 1"), "{alarms}");
    // The next stream is shown the new one.
    bench.json(&["pause", "vm1"]);
    bench.json(&["resume", "vm1"]);
    disk.wait("sync");
    let tls = disk.status()["stream_tls"].clone();
    assert_ne!(tls["receiver_not_after"], first);
    assert!(tls["warnings"].to_string().contains(localhost), "{tls}");

    // Half of a renewal: the old one goes on, and that is said.
    std::fs::write(bench.path("receivers/server-key.pem"), "nonsense").expect("write");
    bench.json(&["pause", "vm1"]);
    bench.json(&["resume", "vm1"]);
    disk.wait("sync");
    let alarms = bench.json_ending(3, &["receiver", "status"])["alarms"].to_string();
    assert!(alarms.contains("the old ones stay in use") && alarms.contains("server-key.pem"), "{alarms}");
}

#[test]
fn streams_in_the_clear_are_not_taken_from_a_network_unless_told() {
    let bench = Bench::new();
    let run = ["receiver", "run", "--listen", "tcp://0.0.0.0:0"];
    let said = bench.run(&run);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.sentence().contains("tls://") && said.sentence().contains("--insecure"), "{said:?}");
    let said = bench.run(&["receiver", "run", "--listen", "tls://127.0.0.1:0"]);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.sentence().contains("--tls-certificates"), "{said:?}");
    let said = bench.run(&["receiver", "run", "--api", "tls://127.0.0.1:0"]);
    assert_eq!(said.code, 5, "{said:?}");
    let _insecure = bench.daemon(&[&run[..], &["--insecure"]].concat());
}
