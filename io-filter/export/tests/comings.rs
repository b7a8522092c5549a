//! Who is let in, and who is expected back: those whose connection the server itself ended.

mod support;

use std::{collections::BTreeSet, time::Duration};

use backtide_export::{Client, ClientError, Directory, Limits, Listener, NbdAddress, NbdUri, Peer, Server};
use support::{Fixed, GRACE, Manual, Place, Raw, command, on_a_worker, settle};
use tokio::{
    net::{TcpSocket, UnixStream},
    task::yield_now,
};

const READ: u16 = 0;
const FLUSH: u16 = 3;

/// How long the servers here wait for a handshake, and let somebody sit who asked for nothing.
const PATIENCE: Duration = Duration::from_millis(100);

fn few(connections: usize) -> Limits {
    Limits { connections, handshake: PATIENCE, ..Limits::default() }
}

async fn connect(place: &Place) -> Raw<UnixStream> {
    Raw::open(UnixStream::connect(place.path("socket")).await.unwrap(), "disk").await
}

/// Has a client ask for something that makes it no idler.
async fn flush(client: &mut Raw<UnixStream>, disk: &Manual) {
    client.send(FLUSH, 1, 0, 0).await;
    disk.until_waiting(1).await;
    disk.answer();
    assert_eq!(client.reply(0).await, (1, Ok(vec![])));
}

/// Whether this process is expected, and nobody else.
fn own_process_is_expected(server: &Server) -> bool {
    let expected: Vec<_> = server.expected().into_iter().collect();
    matches!(expected[..], [Peer::Process { id, .. }] if id == std::process::id())
}

#[test]
fn behind_a_shut_door_nobody_is_served_but_who_is() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let mut server = place.serve(disk.clone()).await;
        let mut guest = connect(&place).await;
        let late = UnixStream::connect(place.path("socket")).await.unwrap();
        while server.handshakes() == 0 {
            yield_now().await;
        }
        server.stop_accepting();
        settle().await;
        UnixStream::connect(place.path("socket")).await.unwrap_err();
        let mut late = Raw::open(late, "disk").await;
        settle().await;
        assert_eq!((server.connections(), server.expected()), (1, BTreeSet::new()));
        assert!(late.is_closed().await, "it is hung up on at the end of its handshake");
        flush(&mut guest, &disk).await;
        server.shutdown(GRACE).await;
    });
}

#[test]
fn who_comes_by_a_shared_socket_to_a_shut_door_waits_for_the_next() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let directory = Directory::new("");
        let listener = Listener::bind(&place.address()).await.unwrap();
        let _shared = listener.serve_directory(directory.clone(), Limits::default());
        let offered = async |own: &str| {
            let listener = Listener::bind(&NbdAddress::Unix(place.path(own))).await.unwrap();
            let mut server = listener.serve(Fixed::one(disk.clone()), Limits::default());
            server.offer_in(&directory, "disk", &"disk".parse().unwrap());
            server
        };
        let mut before = offered("before").await;
        before.stop_accepting();
        let guest = connect(&place);
        let (mut guest, next) = tokio::join!(guest, async {
            settle().await;
            before.shutdown(GRACE).await;
            offered("next").await
        });
        flush(&mut guest, &disk).await;
        next.shutdown(GRACE).await;
    });
}

#[test]
fn a_process_that_gave_way_is_expected_while_it_has_no_other_connection() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let server = place.serve_all(Fixed::one(disk.clone()), few(2)).await;
        let mut silent = connect(&place).await;
        let mut guest = connect(&place).await;
        // Silent for less long than the other, whatever the clock says: of two that would go, that one goes.
        flush(&mut guest, &disk).await;
        let uri = format!("nbd+unix:///disk?socket={}", place.path("socket").display());
        while !command("nbdinfo").args(["--size", &uri]).output().await.unwrap().status.success() {}
        assert!(silent.is_closed().await);
        assert_eq!(server.expected(), BTreeSet::new(), "it is there");
        drop(guest);
        while server.connections() > 0 {
            yield_now().await;
        }
        assert!(own_process_is_expected(&server), "{:?}", server.expected());
        let again = connect(&place).await;
        assert_eq!(server.expected(), BTreeSet::new(), "it has come");
        drop(again);
        while server.connections() > 0 {
            yield_now().await;
        }
        assert_eq!(server.expected(), BTreeSet::new(), "who hangs up is not expected");
    });
}

#[test]
fn a_process_that_was_dropped_for_it_took_nothing_is_expected() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let limits = Limits { stalled: PATIENCE, ..Limits::default() };
        let server = place.serve_all(Fixed::one(disk.clone()), limits).await;
        let mut client = connect(&place).await;
        client.send(READ, 1, 0, 32 << 20).await;
        disk.until_waiting(1).await;
        disk.answer();
        while server.connections() > 0 {
            yield_now().await;
        }
        assert!(own_process_is_expected(&server), "{:?}", server.expected());
    });
}

#[test]
fn of_a_host_that_gave_way_nobody_is_expected() {
    on_a_worker(async {
        let listener = Listener::bind(&NbdAddress::Tcp { host: "127.0.0.1".into(), port: 0 }).await.unwrap();
        let NbdAddress::Tcp { port, .. } = *listener.address() else { panic!("{}", listener.address()) };
        let server = listener.serve(Fixed::one(Manual::new("disk")), few(1));
        let connect = async |from: &str| {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
            socket.connect(([127, 0, 0, 1], port).into()).await.unwrap()
        };
        let mut silent = Raw::open(connect("127.0.0.2").await, "disk").await;
        while server.connections() == 0 {
            yield_now().await;
        }
        let uri = NbdUri {
            address: NbdAddress::Tcp { host: "127.0.0.1".into(), port },
            export: "disk".into(),
            tls: None,
        };
        let other = loop {
            if let Ok(other) = Client::connect(&uri).await {
                break other;
            }
        };
        assert!(silent.is_closed().await);
        assert_eq!(server.clients(), [Peer::Host([127, 0, 0, 1].into())].into());
        drop(other);
        while server.connections() > 0 {
            yield_now().await;
        }
        assert_eq!(server.expected(), BTreeSet::new(), "whether that one is still there nobody hears");
    });
}

#[test]
fn a_process_that_has_most_of_the_places_is_told_that_there_are_no_more() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let _server = place.serve_all(Fixed::one(disk.clone()), few(2)).await;
        let mut guests = [connect(&place).await, connect(&place).await];
        for guest in &mut guests {
            flush(guest, &disk).await;
        }
        // Another's client would get a place once these are silent for so long.
        let rested = std::time::Instant::now();
        while rested.elapsed() < PATIENCE * 2 {
            let refused = Client::connect(&place.uri("disk")).await.map(drop).unwrap_err();
            let ClientError::Protocol(reason) = refused else { panic!("{refused:?}") };
            assert!(reason.to_string().contains("as many clients as it may"), "{reason}");
        }
        flush(&mut guests[0], &disk).await;
    });
}
