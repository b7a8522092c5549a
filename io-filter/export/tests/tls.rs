//! TLS: who gets in, who does not, and what programs others wrote think of it.

mod support;

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use backtide_export::{
    Client, ClientCertificates, ClientError, Directory, Limits, Listener, NbdAddress, NbdTls, NbdUri, Server,
    ServerTls, SocketMode, TlsDemand, TlsError, TlsMode, UriTls, list_exports,
};
use backtide_units::{ByteCount, ByteOffset};
use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType};
use support::{FileExport, Fixed, GRACE, Manual, Place, command, on_a_worker, run, settle};

const SIZE: u64 = 64 << 20;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Writes `whose` certificate for `name`, signed by `authority`, into `folder`.
fn issue(folder: &Path, whose: &str, name: &str, authority: &Authority) {
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, authority).unwrap();
    std::fs::write(folder.join(format!("{whose}-cert.pem")), certificate.pem()).unwrap();
    std::fs::write(folder.join(format!("{whose}-key.pem")), key.serialize_pem()).unwrap();
}

/// Makes the client's certificate one that speaks for `disk`.
fn limit(folder: &Path, disk: &str, authority: &Authority) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["client".to_owned()]).unwrap();
    let uri = format!("backtide:disk/{disk}");
    params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
    let certificate = params.signed_by(&key, authority).unwrap();
    std::fs::write(folder.join("client-cert.pem"), certificate.pem()).unwrap();
    std::fs::write(folder.join("client-key.pem"), key.serialize_pem()).unwrap();
}

/// A folder with everything for both sides.
fn certificates(place: &Place, name: &str) -> PathBuf {
    certificates_and_authority(place, name).0
}

/// The same, and who signs for more.
fn certificates_and_authority(place: &Place, name: &str) -> (PathBuf, Authority) {
    let folder = place.path(name);
    std::fs::create_dir(&folder).unwrap();
    let authority = authority();
    std::fs::write(folder.join("ca-cert.pem"), authority.pem()).unwrap();
    issue(&folder, "server", "localhost", &authority);
    issue(&folder, "client", "client", &authority);
    (folder, authority)
}

/// The same without a client's certificate.
fn without_client(place: &Place, whole: &Path, name: &str) -> PathBuf {
    let folder = place.path(name);
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(whole.join("ca-cert.pem"), folder.join("ca-cert.pem")).unwrap();
    folder
}

async fn serve(place: &Place, mode: TlsMode, folder: &Path, clients: ClientCertificates) -> Server {
    let disk = FileExport::open("disk", &place.image(SIZE), false).unwrap();
    let tls = ServerTls::load(mode, folder, clients).await.unwrap();
    let listener = Listener::bind(&place.address()).await.unwrap().with_tls(tls);
    listener.serve(Fixed::one(disk), Limits::default())
}

fn secure(place: &Place, folder: &Path) -> NbdUri {
    let tls = UriTls { certificates: folder.to_path_buf(), hostname: None, required: true };
    NbdUri { tls: Some(tls), ..place.uri("disk") }
}

async fn works(uri: &NbdUri) {
    let client = Client::connect(uri).await.unwrap();
    let data = Bytes::from((0..(5 << 20)).map(|at| (at / 3) as u8).collect::<Vec<_>>());
    client.write(ByteOffset(4096), data.clone(), true).await.unwrap();
    assert!(client.read(ByteOffset(4096), ByteCount::of(&data)).await.unwrap() == data);
}

#[test]
fn under_tls_everything_is_as_it_was() {
    on_a_worker(async {
        for mode in [TlsMode::Optional, TlsMode::Required] {
            let place = Place::new();
            let folder = certificates(&place, "pki");
            let server = serve(&place, mode, &folder, ClientCertificates::Required).await;
            works(&secure(&place, &folder)).await;
            let listed = list_exports(&secure(&place, &folder), &Default::default()).await.unwrap();
            assert_eq!(listed[0].name, "disk");
            server.shutdown(GRACE).await;
        }
    });
}

#[test]
fn without_tls_only_an_optional_server_serves() {
    on_a_worker(async {
        let place = Place::new();
        let folder = certificates(&place, "pki");
        let server = serve(&place, TlsMode::Optional, &folder, ClientCertificates::Required).await;
        works(&place.uri("disk")).await;
        server.shutdown(GRACE).await;
        let server = serve(&place, TlsMode::Required, &folder, ClientCertificates::Required).await;
        let refused = Client::connect(&place.uri("disk")).await.unwrap_err();
        assert!(matches!(refused, ClientError::Protocol(_)), "{refused:?}");
        server.shutdown(GRACE).await;
        let server = place.serve(Manual::new("disk")).await;
        let refused = Client::connect(&secure(&place, &folder)).await.unwrap_err();
        assert!(matches!(refused, ClientError::Protocol(_)), "{refused:?}");
        server.shutdown(GRACE).await;
    });
}

#[test]
fn a_client_nobody_vouches_for_is_not_let_in() {
    on_a_worker(async {
        let place = Place::new();
        let folder = certificates(&place, "pki");
        let stranger = without_client(&place, &folder, "stranger");
        let other = authority();
        let forged = without_client(&place, &folder, "forged");
        issue(&forged, "client", "client", &other);

        let server = serve(&place, TlsMode::Required, &folder, ClientCertificates::Required).await;
        for folder in [&stranger, &forged] {
            // In TLS 1.3 the client is done before it is refused: it may hear of it only then.
            let refused = Client::connect(&secure(&place, folder)).await.unwrap_err();
            assert!(refused.is_lost(), "{refused:?}");
        }
        works(&secure(&place, &folder)).await;
        server.shutdown(GRACE).await;

        let server = serve(&place, TlsMode::Required, &folder, ClientCertificates::NotAsked).await;
        works(&secure(&place, &stranger)).await;
        server.shutdown(GRACE).await;
    });
}

#[test]
fn a_client_whose_certificate_names_disks_is_served_no_other() {
    on_a_worker(async {
        let place = Place::new();
        let (folder, authority) = certificates_and_authority(&place, "pki");
        let tls = ServerTls::load(TlsMode::Required, &folder, ClientCertificates::Required).await.unwrap();
        let disk = FileExport::open("disk", &place.image(SIZE), false).unwrap();
        let listener = Listener::bind(&place.address()).await.unwrap().with_tls(tls);
        let server = listener.for_disk("db-1".parse().unwrap()).serve(Fixed::one(disk), Limits::default());
        let uri = secure(&place, &folder);
        works(&uri).await;
        for (named, served) in [("db-*", true), ("db-1", true), ("db-2", false), ("web-*", false)] {
            limit(&folder, named, &authority);
            if served {
                works(&uri).await;
                assert_eq!(list_exports(&uri, &Default::default()).await.unwrap().len(), 1, "{named}");
                continue;
            }
            assert_eq!(list_exports(&uri, &Default::default()).await.unwrap().len(), 0, "{named}");
            let refused = Client::connect(&uri).await.unwrap_err();
            assert!(format!("{refused:?}").contains("no such export"), "{named}: {refused:?}");
        }
        server.shutdown(GRACE).await;
    });
}

/// A server of `disk`, on a socket of its own, that offers it in `directory`.
async fn offered(place: &Place, directory: &Directory, disk: &str) -> Server {
    let path = place.path(disk);
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let own = NbdAddress::Unix(place.path(&format!("{disk}.own")));
    let file = FileExport::open(disk, &path, false).unwrap();
    let mut server = Listener::bind(&own).await.unwrap().serve(Fixed::one(file), Limits::default());
    server.offer_in(directory, disk, &disk.parse().unwrap());
    server
}

/// The socket that all share.
async fn shared(place: &Place, folder: &Path, directory: &Directory) -> Server {
    let tls = ServerTls::load(TlsMode::Required, folder, ClientCertificates::Required).await.unwrap();
    let listener = Listener::bind(&place.address()).await.unwrap().with_tls(tls);
    listener.serve_directory(directory.clone(), Limits::default())
}

#[test]
fn on_a_shared_socket_a_client_finds_the_disks_its_certificate_names() {
    on_a_worker(async {
        let place = Place::new();
        let (folder, authority) = certificates_and_authority(&place, "pki");
        let directory = Directory::new("");
        let mut servers = Vec::new();
        for disk in ["db-1", "db-2", "web"] {
            servers.push(offered(&place, &directory, disk).await);
        }
        let _front = shared(&place, &folder, &directory).await;
        let of = |disk: &str| NbdUri { export: disk.into(), ..secure(&place, &folder) };
        // Whose certificate names none may have all. What TLS has read goes along to the disk's server.
        for (named, found) in [
            (None, vec!["db-1", "db-2", "web"]),
            (Some("db-*"), vec!["db-1", "db-2"]),
            (Some("web"), vec!["web"]),
            (Some("mail"), vec![]),
        ] {
            named.inspect(|disk| limit(&folder, disk, &authority));
            let listed = list_exports(&of(""), &Default::default()).await.unwrap();
            let listed: Vec<&str> = listed.iter().map(|export| export.name.as_str()).collect();
            assert_eq!(listed, found, "{named:?}");
            for disk in ["db-1", "db-2", "web"] {
                if found.contains(&disk) {
                    works(&of(disk)).await;
                } else {
                    let refused = Client::connect(&of(disk)).await.unwrap_err();
                    assert!(format!("{refused:?}").contains("no such export"), "{named:?}: {refused:?}");
                }
            }
            let default = Client::connect(&of("")).await;
            assert_eq!(default.is_ok(), found.len() == 1, "{named:?}");
        }
    });
}

#[test]
fn a_disk_that_is_expected_is_nothing_to_clients_whose_certificate_does_not_name_it() {
    on_a_worker(async {
        let place = Place::new();
        let (folder, authority) = certificates_and_authority(&place, "pki");
        let directory = Directory::new("");
        let _there = offered(&place, &directory, "db").await;
        directory.expect("web", &"web".parse().unwrap());
        let front = shared(&place, &folder, &directory).await;
        let of = |disk: &str| NbdUri { export: disk.into(), ..secure(&place, &folder) };
        limit(&folder, "db", &authority);
        works(&of("")).await;
        let refused = Client::connect(&of("web")).await.unwrap_err();
        assert!(format!("{refused:?}").contains("no such export"), "it does not wait: {refused:?}");
        limit(&folder, "web", &authority);
        let uri = of("");
        let waiting = tokio::task::spawn_local(async move { Client::connect(&uri).await });
        while front.handshakes() == 0 {
            tokio::task::yield_now().await;
        }
        settle().await;
        assert!(!waiting.is_finished());
        let _web = offered(&place, &directory, "web").await;
        waiting.await.unwrap().expect("what it waited for is there");
    });
}

#[test]
fn a_server_that_is_not_the_one_is_not_trusted() {
    on_a_worker(async {
        let place = Place::new();
        let (ours, theirs) = (certificates(&place, "ours"), certificates(&place, "theirs"));
        let server = serve(&place, TlsMode::Required, &theirs, ClientCertificates::NotAsked).await;
        let refused = Client::connect(&secure(&place, &ours)).await.unwrap_err();
        assert!(matches!(refused, ClientError::Tls { .. }), "{refused:?}");
        // Vouched for, but as somebody else.
        let mut uri = secure(&place, &theirs);
        uri.tls.as_mut().unwrap().hostname = Some("vm.example".into());
        let refused = Client::connect(&uri).await.unwrap_err();
        assert!(matches!(refused, ClientError::Tls { .. }), "{refused:?}");
        uri.tls.as_mut().unwrap().hostname = Some("localhost".into());
        works(&uri).await;
        server.shutdown(GRACE).await;
    });
}

#[test]
fn files_that_cannot_be_used_are_named() {
    on_a_worker(async {
        let place = Place::new();
        let folder = certificates(&place, "pki");
        let served = NbdTls { mode: TlsDemand::Required, certificates: folder.clone() };
        served.check().unwrap();
        std::fs::copy(folder.join("client-key.pem"), folder.join("server-key.pem")).unwrap();
        let error = served.check().unwrap_err();
        assert!(matches!(error, TlsError::Key { .. }), "a key of another certificate: {error:?}");
        std::fs::remove_file(folder.join("server-key.pem")).unwrap();
        let error = served.check().unwrap_err().to_string();
        assert!(error.contains("server-key.pem"), "{error}");
        std::fs::write(folder.join("server-cert.pem"), "no certificate").unwrap();
        assert!(matches!(served.check().unwrap_err(), TlsError::Empty { .. }));
        std::fs::remove_file(folder.join("ca-cert.pem")).unwrap();
        let load = |mode| ServerTls::load(mode, &folder, Default::default());
        let error = load(TlsMode::Required).await.unwrap_err().to_string();
        assert!(error.contains("ca-cert.pem"), "nobody is unverified by accident: {error}");
        load(TlsMode::Off).await.unwrap();
        let error = Client::connect(&secure(&place, &folder)).await.unwrap_err();
        assert!(matches!(error, ClientError::TlsFiles(_)), "{error:?}");
    });
}

#[test]
fn a_uri_with_tls_is_enough_to_listen() {
    on_a_worker(async {
        let place = Place::new();
        let folder = certificates(&place, "pki");
        let address = NbdAddress::Tcp { host: "localhost".into(), port: 0 };
        let wanted = NbdUri { address, ..secure(&place, &folder) };
        let listener = Listener::bind_uri(&wanted, SocketMode::PRIVATE).await.unwrap();
        let uri = NbdUri { address: listener.address().clone(), ..wanted };
        let disk = FileExport::open("disk", &place.image(SIZE), false).unwrap();
        let server = listener.serve(Fixed::one(disk), Limits::default());
        works(&uri).await;
        let clear = NbdUri { tls: None, ..uri };
        assert!(Client::connect(&clear).await.is_err());
        server.shutdown(GRACE).await;
    });
}

#[test]
fn what_is_configured_is_for_sockets_that_say_nothing_of_tls() {
    on_a_worker(async {
        let place = Place::new();
        let folder = certificates(&place, "pki");
        for (demand, in_the_clear) in [(TlsDemand::Optional, true), (TlsDemand::Required, false)] {
            let configured = NbdTls { mode: demand, certificates: folder.clone() };
            configured.check().unwrap();
            let uri = configured.unless_told(place.uri("disk"));
            assert_eq!(uri.to_string(), secure(&place, &folder).to_string());
            let disk = FileExport::open("disk", &place.image(SIZE), false).unwrap();
            let listener = Listener::bind_uri(&uri, SocketMode::PRIVATE).await.unwrap();
            let server = listener.serve(Fixed::one(disk), Limits::default());
            works(&uri).await;
            assert_eq!(Client::connect(&place.uri("disk")).await.is_ok(), in_the_clear);
            server.shutdown(GRACE).await;
            // What a URI says goes before.
            let told = secure(&place, &place.path("other"));
            assert_eq!(configured.unless_told(told.clone()), told);
        }
        let missing = NbdTls { mode: TlsDemand::Required, certificates: place.path("missing") };
        assert!(missing.check().unwrap_err().to_string().contains("missing/ca-cert.pem"));
    });
}

#[test]
fn a_client_that_stops_in_the_middle_of_tls_is_dropped_and_others_are_served() {
    on_a_worker(async {
        let place = Place::new();
        let folder = certificates(&place, "pki");
        let server = serve(&place, TlsMode::Required, &folder, ClientCertificates::Required).await;
        let hello = b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0";
        let mut stopped = Vec::new();
        for rest in [&b""[..], b"\x16\x03\x01\x02\x00\x01", b"this is no TLS at all, whatever it is"] {
            let mut stream = tokio::net::UnixStream::connect(place.path("socket")).await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, hello).await.unwrap();
            let mut answer = [0; 18 + 20];
            tokio::io::AsyncReadExt::read_exact(&mut stream, &mut answer).await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, rest).await.unwrap();
            stopped.push(stream);
        }
        works(&secure(&place, &folder)).await;
        // Nor does the server wait for it when it ends.
        let down = tokio::task::spawn_local(server.shutdown(GRACE));
        support::settle().await;
        assert!(down.is_finished());
    });
}

#[test]
fn many_requests_under_tls_are_bounded_and_all_answered() {
    on_a_worker(async {
        let place = Place::new();
        let folder = certificates(&place, "pki");
        let server = serve(&place, TlsMode::Required, &folder, ClientCertificates::Required).await;
        let client = Client::connect(&secure(&place, &folder)).await.unwrap();
        // More than sockets and TLS hold between them, both ways at once.
        let tasks: Vec<_> = (0..64_u64)
            .map(|number| {
                let client = client.clone();
                tokio::spawn(async move {
                    let (offset, length) = (ByteOffset(number << 20), ByteCount(1 << 20));
                    let data = Bytes::from(vec![number as u8; 1 << 20]);
                    client.write(offset, data.clone(), false).await.unwrap();
                    assert!(client.read(offset, length).await.unwrap() == data, "write {number}");
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        drop(client);
        server.shutdown(GRACE).await;
    });
}

#[test]
fn foreign_clients_speak_tls_with_our_server() {
    on_a_worker(async {
        let place = Place::new();
        let folder = certificates(&place, "pki");
        let tls = ServerTls::load(TlsMode::Required, &folder, ClientCertificates::Required).await.unwrap();
        let address = NbdAddress::Tcp { host: "localhost".into(), port: 0 };
        let listener = Listener::bind(&address).await.unwrap().with_tls(tls);
        let disk = FileExport::open("disk", &place.image(SIZE), false).unwrap();
        let server = listener.serve(Fixed::one(disk), Limits::default());
        let NbdAddress::Tcp { port, .. } = server.address().clone() else { panic!("not TCP") };
        let pki = folder.to_str().unwrap();

        let uri = format!("nbds://localhost:{port}/disk?tls-certificates={pki}");
        let shown = run("nbdinfo", &[&uri]).await;
        assert!(shown.contains("protocol: newstyle-fixed with TLS"), "{shown}");
        let source = place.path("source");
        support::write_noise(&source, SIZE as usize);
        let copy = place.path("copy");
        run("nbdcopy", &[source.to_str().unwrap(), &uri]).await;
        run("nbdcopy", &["--connections=2", &uri, copy.to_str().unwrap()]).await;
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(&source).unwrap());

        let tls = format!("tls-creds-x509,id=tls0,endpoint=client,dir={pki}");
        let image = format!(
            "driver=raw,file.driver=nbd,file.host=localhost,file.port={port},file.export=disk,file.tls-creds=tls0"
        );
        let steps =
            ["--object", &tls, "--image-opts", "-c", "write -P 7 1M 4M", "-c", "read -P 7 1M 4M", &image];
        let printed = run("qemu-io", &steps).await;
        assert!(!printed.contains("failed"), "{printed}");

        let clear = format!("nbd://localhost:{port}/disk");
        assert!(!command("nbdinfo").arg(&clear).output().await.unwrap().status.success());
        server.shutdown(GRACE).await;
    });
}

#[test]
fn tls_1_2_is_served_too() {
    on_a_worker(async {
        let place = Place::new();
        let folder = certificates(&place, "pki");
        let server = serve(&place, TlsMode::Required, &folder, ClientCertificates::Required).await;
        let pki = folder.to_str().unwrap();
        let tls = format!(
            "tls-creds-x509,id=tls0,endpoint=client,dir={pki},priority=NORMAL:-VERS-ALL:+VERS-TLS1.2"
        );
        let socket = place.path("socket");
        let image = format!(
            "driver=raw,file.driver=nbd,file.path={},file.export=disk,file.tls-creds=tls0,file.tls-hostname=localhost",
            socket.display()
        );
        let printed =
            run("qemu-io", &["--object", &tls, "--image-opts", "-c", "write -P 7 1M 4M", &image]).await;
        assert!(!printed.contains("failed"), "{printed}");
        server.shutdown(GRACE).await;
    });
}

#[test]
fn our_client_speaks_tls_with_foreign_servers() {
    on_a_worker(async {
        let place = Place::new();
        let folder = certificates(&place, "pki");
        let mut nbdkit = command("nbdkit");
        nbdkit.args(["--foreground", "--tls=require", "--tls-verify-peer", "--unix"]);
        nbdkit.arg(place.path("socket")).arg(format!("--tls-certificates={}", folder.display()));
        let mut server = nbdkit.args(["memory", "64M"]).stderr(Stdio::inherit()).spawn().unwrap();
        let uri = secure(&place, &folder);
        loop {
            match Client::connect(&uri).await {
                Ok(_) => break,
                Err(ClientError::Connect { .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}: {error:?}"),
            }
            assert!(server.try_wait().unwrap().is_none(), "nbdkit ended before it answered");
        }
        works(&uri).await;
        server.kill().await.unwrap();
    });
}

#[test]
fn a_server_shows_the_certificate_that_is_there_now() {
    on_a_worker(async {
        let place = Place::new();
        let folder = certificates(&place, "pki");
        let server = serve(&place, TlsMode::Required, &folder, ClientCertificates::Required).await;
        let uri = secure(&place, &folder);
        let client = Client::connect(&uri).await.unwrap();
        // Of another authority altogether: who knew the old one only is let in no more.
        let old = place.path("old");
        std::fs::rename(&folder, &old).unwrap();
        certificates(&place, "pki");
        assert!(Client::connect(&secure(&place, &old)).await.is_err());
        works(&uri).await;
        // Who is there stays there.
        let bytes = client.read(ByteOffset(0), ByteCount(4096)).await.unwrap();
        assert_eq!(bytes.len(), 4096);
        server.shutdown(GRACE).await;
    });
}
