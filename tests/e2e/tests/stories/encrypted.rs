//! NBD under TLS, from the guest's side to the mounted point.

use std::path::Path;

use backtide_e2e::{Bench, tools};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose};

const SIZE: u64 = 64 << 20;

/// A folder with an authority, a server's and a client's certificate.
fn certificates(folder: &Path) {
    std::fs::create_dir(folder).expect("make a directory");
    let mut params = CertificateParams::new(vec![]).expect("an authority has no name");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = || KeyPair::generate().expect("generate a key");
    let authority = CertifiedIssuer::self_signed(params, key()).expect("sign");
    std::fs::write(folder.join("ca-cert.pem"), authority.pem()).expect("write");
    for (whose, name) in [("server", "localhost"), ("client", "guest")] {
        let key = key();
        let params = CertificateParams::new(vec![name.to_owned()]).expect("a DNS name");
        let certificate = params.signed_by(&key, &authority).expect("sign");
        std::fs::write(folder.join(format!("{whose}-cert.pem")), certificate.pem()).expect("write");
        std::fs::write(folder.join(format!("{whose}-key.pem")), key.serialize_pem()).expect("write");
    }
}

#[test]
fn a_disk_and_its_points_are_served_under_tls_to_whom_they_know() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    certificates(&bench.path("pki"));
    bench.image("vm1.img", SIZE);
    bench.image("pattern", SIZE);
    let pattern = bench.name("pattern");
    tools::run("qemu-io", &["-f", "raw", &pattern, "-c", "write -P 0x5a 3M 20M"]);
    let uri = |name: &str, socket: &str| {
        format!("nbds+unix:///{name}?socket={}&tls-certificates={}", bench.name(socket), bench.name("pki"))
    };
    let disk_uri = uri("vm1", "vm1.tls");
    let disk = bench.attach("vm1", "vm1.img", &["--nbd", &disk_uri]);
    disk.wait("sync");
    assert_eq!(disk.uri(), disk_uri);

    // A program nobody here wrote writes it all, and reads it back.
    tools::run("nbdcopy", &[&pattern, &disk_uri]);
    let shown = tools::run("nbdinfo", &[&disk_uri]);
    assert!(shown.contains("with TLS"), "{shown}");
    let clear = format!("nbd+unix:///vm1?socket={}", bench.name("vm1.tls"));
    assert!(!tools::try_run("nbdinfo", &[&clear]).0, "served without TLS");
    disk.settle();
    tools::assert_same(&pattern, disk.restore("latest").to_str().expect("a path of text"));

    let mounted = uri("point", "point.tls");
    bench.json(&["mount", "vm1", "--at", "latest", "--nbd", &mounted]);
    let copy = bench.name("copy");
    tools::run("nbdcopy", &[&mounted, &copy]);
    tools::assert_same(&pattern, &copy);
    // And the other way round: a point restored into a server under TLS.
    bench.image("back.img", SIZE);
    let back = bench.attach("back", "back.img", &["--nbd", &uri("back", "back.tls")]);
    back.wait("sync");
    bench.json(&["restore", "vm1", "--at", "latest", "--output", &back.uri()]);
    tools::assert_same(&pattern, &bench.name("back.img"));
}

#[test]
fn daemons_told_to_use_tls_use_it_for_every_socket_of_theirs() {
    let bench = Bench::new();
    certificates(&bench.path("pki"));
    let pki = bench.name("pki");
    let tls = ["--nbd-tls", "required", "--nbd-tls-certificates", &pki];
    let _receiver = bench.daemon(&[&["receiver", "run"], &tls[..]].concat());
    let _agent = bench.daemon(&[&["agent", "run"], &tls[..]].concat());
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    assert!(disk.uri().starts_with("nbds+unix:///vm1?"), "{}", disk.uri());
    assert!(tools::run("nbdinfo", &[&disk.uri()]).contains("with TLS"));
    let mount = bench.json(&["mount", "vm1", "--at", "latest"]);
    let point = mount["uri"].as_str().expect("a URI");
    assert!(tools::run("nbdinfo", &[point]).contains("with TLS"), "{point}");

    let said = bench.plain(&["agent", "run", "--nbd-tls", "required"]);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.stderr.contains("--nbd-tls-certificates"), "{said:?}");
}

#[test]
fn commands_look_into_points_of_a_receiver_that_serves_under_tls() {
    let bench = Bench::new();
    let pki = bench.name("pki");
    assert_eq!(bench.run(&["pki", "init", &pki, "--receiver", "localhost"]).code, 0);
    // The folder of a server: no client's certificate is in it.
    let folder = bench.name("pki/localhost");
    let tls = ["--nbd-tls", "required", "--nbd-tls-certificates", &folder];
    // Who may connect elsewhere may not here.
    let _receiver = bench.daemon(&[&["receiver", "run", "--nbd-mode", "0660"], &tls[..]].concat());
    let _agent = bench.agent();
    let (image, tree) = (bench.name("vm1.img"), bench.path("tree"));
    std::fs::create_dir(&tree).expect("make a directory");
    std::fs::write(tree.join("hosts"), "127.0.0.1 here\n").expect("write");
    tools::run("truncate", &["-s", "16M", &image]);
    tools::run("mkfs.ext4", &["-q", "-F", "-d", tree.to_str().expect("text"), &image]);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.settle();
    let from = format!("lsn:{}", disk.last());
    disk.qemu_io(&["write -P 0x11 12M 4k"]);
    disk.settle();

    disk.latest_is_the_image();
    let listed = bench.json(&["ls", "vm1", "/"]);
    assert_eq!(listed["entries"][0]["name"], "hosts", "{listed}");
    let copied = bench.plain(&["cp", "vm1", "/hosts", "-"]);
    assert_eq!((copied.code, copied.stdout.as_str()), (0, "127.0.0.1 here\n"), "{copied:?}");
    let differing = bench.json(&["diff", "vm1", "--from", &from, "--files", "--content"]);
    assert_eq!((&differing["added"], &differing["changed"]), (&0.into(), &0.into()), "{differing}");
    // What stays is under TLS as it was told.
    let mount = bench.json(&["mount", "vm1", "--at", "latest"]);
    let uri = mount["uri"].as_str().expect("a URI");
    assert!(uri.starts_with("nbds+unix:"), "{uri}");
    let plain = format!("nbd+unix:///point?socket={}", bench.name("point.sock"));
    let mount = bench.json(&["mount", "vm1", "--at", "latest", "--nbd", &plain]);
    assert!(
        mount["uri"].as_str().expect("a URI").starts_with("nbds+unix:"),
        "its URI says nothing of TLS: {mount}"
    );
}

#[test]
fn certificates_that_cannot_be_used_are_named_at_the_attach() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    bench.image("vm1.img", SIZE);
    let uri = format!("nbds+unix:///vm1?socket={}&tls-certificates=/nowhere", bench.name("vm1.tls"));
    let receiver = bench.socket("stream.sock");
    let image = bench.name("vm1.img");
    let said = bench.run(&["attach", "vm1", &image, "--receiver", &receiver, "--nbd", &uri]);
    assert_ne!(said.code, 0);
    assert!(said.sentence().contains("/nowhere/ca-cert.pem"), "{said:?}");
}
