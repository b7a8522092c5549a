//! One socket for the exports of several servers, each on a thread of its own.

mod support;

use std::{path::PathBuf, rc::Rc, time::Duration};

use backtide_export::{
    Client, ClientError, Directory, Export, ExportInfo, Limits, Listener, NbdAddress, NbdUri, Server,
};
use backtide_units::{ByteCount, ByteOffset, DiskName};
use bytes::Bytes;
use support::{FileExport, Fixed, GRACE, Manual, Place, Raw, command, on_a_worker, run, settle, write_noise};
use tokio::{net::UnixStream, sync::oneshot};

const FLUSH: u16 = 3;
const SIZE: usize = 8 << 20;

fn name(name: &str) -> DiskName {
    name.parse().unwrap()
}

/// A place whose `socket` is the shared one.
async fn shared(place: &Place, directory: &Directory, limits: Limits) -> Server {
    Listener::bind(&place.address()).await.unwrap().serve_directory(directory.clone(), limits)
}

/// A server of `export` alone, on a socket of its own, that offers it in `directory`.
async fn offered(place: &Place, directory: &Directory, export: Rc<dyn Export>, limits: Limits) -> Server {
    let own = export.info().name;
    let listener = Listener::bind(&NbdAddress::Unix(place.path(&format!("{own}.own")))).await.unwrap();
    let mut server = listener.serve(Fixed::one(export), limits);
    server.offer_in(directory, &own, &name(&own));
    server
}

async fn connect(place: &Place, export: &str) -> Raw<UnixStream> {
    Raw::open(UnixStream::connect(place.path("socket")).await.unwrap(), export).await
}

/// Serves a file of noise on a thread of its own, until what is returned is dropped.
fn on_its_thread(directory: &Directory, path: PathBuf, disk: &'static str) -> oneshot::Sender<()> {
    let (end, ended) = oneshot::channel();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let directory = directory.clone();
    std::thread::spawn(move || {
        on_a_worker(async {
            let place = Place::new();
            let export = FileExport::open(disk, &path, false).unwrap();
            let server = offered(&place, &directory, export, Limits::default()).await;
            ready.send(()).unwrap();
            let _ = ended.await;
            server.shutdown(GRACE).await;
        });
    });
    is_ready.recv().unwrap();
    end
}

#[test]
fn programs_others_wrote_find_the_exports_of_every_thread_on_one_socket() {
    let place = Place::new();
    let directory = Directory::new("");
    let mut threads = Vec::new();
    for disk in ["vm1", "vm2"] {
        write_noise(&place.path(disk), SIZE);
        threads.push(on_its_thread(&directory, place.path(disk), disk));
    }
    on_a_worker(async {
        let front = shared(&place, &directory, Limits::default()).await;
        let list = run("nbdinfo", &["--list", &place.uri("").to_string()]).await;
        for disk in ["vm1", "vm2"] {
            assert!(list.contains(&format!("export=\"{disk}\"")), "{disk} is not in {list}");
            let (uri, image) = (place.uri(disk).to_string(), place.path(disk));
            let image = image.to_str().unwrap();
            assert_eq!(run("nbdinfo", &["--size", &uri]).await.trim(), SIZE.to_string());
            run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, image]).await;
            // Several connections of one program, one after the other of another.
            let copy = place.path("copy");
            run("nbdcopy", &["--connections=4", &uri, copy.to_str().unwrap()]).await;
            assert!(std::fs::read(&copy).unwrap() == std::fs::read(image).unwrap(), "{disk}");
            let write = ["-f", "raw", &uri, "-c", "write -P 9 1M 3M", "-c", "flush", "-c", "read -P 9 1M 3M"];
            run("qemu-io", &write).await;
            assert_eq!(std::fs::read(image).unwrap()[1 << 20..4 << 20], [9; 3 << 20]);
        }
        for refused in ["", "vm3"] {
            let uri = place.uri(refused).to_string();
            let output = command("nbdinfo").arg(&uri).output().await.unwrap();
            assert!(!output.status.success(), "{refused:?} is nothing here");
        }
        // The last ones were refused, and leave when they have heard it.
        while front.handshakes() > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(front.connections(), 0, "they were all handed on");
        front.shutdown(GRACE).await;
    });
}

#[test]
fn the_default_export_is_the_only_one_or_the_one_that_was_chosen() {
    on_a_worker(async {
        for chosen in ["", "two"] {
            let (place, directory) = (Place::new(), Directory::new(chosen));
            let _front = shared(&place, &directory, Limits::default()).await;
            let of = |name: &str, size: u64| Manual::with(ExportInfo::new(name, ByteCount(size)));
            let (one, two) = (of("one", 1 << 20), of("two", 2 << 20));
            let _one = offered(&place, &directory, one, Limits::default()).await;
            let open = async || Client::connect(&place.uri("")).await;
            let default = async || open().await.ok().map(|client| client.size().0);
            assert_eq!(default().await, chosen.is_empty().then_some(1 << 20), "{chosen:?}");
            let _two = offered(&place, &directory, two, Limits::default()).await;
            assert_eq!(default().await, (!chosen.is_empty()).then_some(2 << 20), "{chosen:?}");
        }
    });
}

#[test]
fn a_client_of_an_export_that_is_expected_waits_until_it_is_there() {
    on_a_worker(async {
        let (place, directory) = (Place::new(), Directory::new(""));
        let front = shared(&place, &directory, Limits { handshakes: 2, ..Limits::default() }).await;
        directory.expect("disk", &name("disk"));
        let uri = place.uri("disk");
        let client = tokio::task::spawn_local(async move { Client::connect(&uri).await });
        while front.handshakes() == 0 {
            tokio::task::yield_now().await;
        }
        settle().await;
        assert!(!client.is_finished());
        // Those that wait are in nobody's way, nor in each other's: all of an agent's clients come at once.
        let mut others = Vec::new();
        for count in 2..=8 {
            let uri = place.uri("disk");
            others.push(tokio::task::spawn_local(async move { Client::connect(&uri).await }));
            while front.handshakes() < count {
                tokio::task::yield_now().await;
                assert!(!client.is_finished(), "it was thrown out for another");
            }
            settle().await;
        }
        let disk = Manual::new("disk");
        let server = offered(&place, &directory, disk.clone(), Limits::default()).await;
        let client = client.await.unwrap().expect("it is there");
        for other in others {
            drop(other.await.unwrap().expect("it is there"));
        }
        // A hand-over closes the connection, and the next server has it: nobody is told that there is no such export.
        let down = tokio::task::spawn_local(server.hand_over(GRACE));
        assert!(client.flush().await.unwrap_err().is_lost());
        down.await.unwrap();
        let uri = place.uri("disk");
        let again = tokio::task::spawn_local(async move { Client::connect(&uri).await });
        settle().await;
        assert!(!again.is_finished());
        let server = offered(&place, &directory, disk.clone(), Limits::default()).await;
        let again = again.await.unwrap().expect("it is there again");
        let (flushed, ()) = tokio::join!(again.flush(), async {
            disk.until_waiting(1).await;
            disk.answer();
        });
        flushed.unwrap();
        server.shutdown(GRACE).await;
        let uri = place.uri("disk");
        let last = tokio::task::spawn_local(async move { Client::connect(&uri).await });
        settle().await;
        directory.forget("disk");
        let refused = last.await.unwrap().unwrap_err();
        assert!(format!("{refused:?}").contains("no such export"), "{refused:?}");
    });
}

#[test]
fn clients_of_both_sockets_count_together_and_end_together() {
    on_a_worker(async {
        let (place, directory) = (Place::new(), Directory::new(""));
        let _front = shared(&place, &directory, Limits::default()).await;
        let limits = Limits { connections: 2, ..Limits::default() };
        let (disk, other) = (Manual::new("disk"), Manual::new("other"));
        let server = offered(&place, &directory, disk.clone(), limits).await;
        let _other = offered(&place, &directory, other.clone(), limits).await;
        let own = NbdUri { address: NbdAddress::Unix(place.path("disk.own")), ..place.uri("disk") };
        let first = Client::connect(&own).await.unwrap();
        let mut second = connect(&place, "disk").await;
        while server.connections() < 2 {
            tokio::task::yield_now().await;
        }
        for uri in [place.uri("disk"), own] {
            let refused = Client::connect(&uri).await.unwrap_err();
            let ClientError::Protocol(reason) = refused else { panic!("{refused:?}") };
            assert!(reason.to_string().contains("as many clients as it may"), "{reason}");
        }
        Client::connect(&place.uri("other")).await.expect("one export's clients take no other's places");
        second.send(FLUSH, 1, 0, 0).await;
        disk.until_waiting(1).await;
        let down = tokio::task::spawn_local(server.shutdown(GRACE));
        settle().await;
        assert!(!down.is_finished(), "what is in flight is finished");
        disk.answer();
        assert_eq!(second.reply(0).await, (1, Ok(vec![])));
        assert!(second.is_closed().await);
        assert!(first.flush().await.unwrap_err().is_lost());
        down.await.unwrap();
    });
}

#[test]
fn what_a_client_sent_before_it_was_handed_on_is_not_lost() {
    on_a_worker(async {
        let (place, directory) = (Place::new(), Directory::new(""));
        let _front = shared(&place, &directory, Limits::default()).await;
        let disk = FileExport::open("disk", &place.image(1 << 20), false).unwrap();
        let server = offered(&place, &directory, disk, Limits::default()).await;
        // Handshake and requests in one go, the last cut in the middle: some of it is read with the handshake.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend_from_slice(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk");
        let request = |cookie: u64| {
            let mut bytes = b"\x25\x60\x95\x13\0\0\0\x01".to_vec();
            bytes.extend_from_slice(&cookie.to_be_bytes());
            bytes.extend_from_slice(&(cookie * 4096).to_be_bytes());
            bytes.extend_from_slice(&4096_u32.to_be_bytes());
            bytes.resize(bytes.len() + 4096, cookie as u8);
            bytes
        };
        let mut all: Vec<u8> = (0..8).flat_map(request).collect();
        let rest = all.split_off(all.len() - 1000);
        let mut stream = UnixStream::connect(place.path("socket")).await.unwrap();
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        stream.write_all(&[hello, all].concat()).await.unwrap();
        stream.read_exact(&mut [0; 28]).await.unwrap();
        while server.connections() == 0 {
            tokio::task::yield_now().await;
        }
        stream.write_all(&rest).await.unwrap();
        let mut client = Raw { stream };
        for cookie in 0..8 {
            assert_eq!(client.reply(0).await, (cookie, Ok(vec![])));
        }
        let image = std::fs::read(place.path("disk.img")).unwrap();
        for cookie in 0..8_usize {
            assert!(image[cookie * 4096..][..4096] == [cookie as u8; 4096], "block {cookie}");
        }
    });
}

#[test]
fn who_never_asked_for_anything_gives_way_in_time_and_who_did_stays() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let limits = Limits { connections: 2, handshake: Duration::from_millis(100), ..Limits::default() };
        let _server = place.serve_all(Fixed::one(disk.clone()), limits).await;
        let guest = Client::connect(&place.uri("disk")).await.unwrap();
        let answering = async || loop {
            disk.until_waiting(1).await;
            disk.answer();
        };
        let flush =
            async || tokio::select!(flushed = guest.flush() => flushed, () = answering() => unreachable!());
        flush().await.unwrap();
        let mut silent = connect(&place, "disk").await;
        // Nobody is told how long it takes; somebody gets in without anybody leaving.
        let real = loop {
            match Client::connect(&place.uri("disk")).await {
                Ok(client) => break client,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        assert!(silent.is_closed().await);
        flush().await.expect("the guest was silent for as long, and had asked");
        let read = async |client: &Client| {
            let read = client.read(ByteOffset(0), ByteCount(512));
            tokio::select!(read = read => read, () = answering() => unreachable!())
        };
        assert_eq!(read(&real).await.unwrap(), Bytes::from(vec![0; 512]));
        // That one has asked once, and rests.
        let another = loop {
            match Client::connect(&place.uri("disk")).await {
                Ok(client) => break client,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        assert!(real.read(ByteOffset(0), ByteCount(512)).await.unwrap_err().is_lost());
        flush().await.expect("the guest goes on");
        drop(another);
    });
}
