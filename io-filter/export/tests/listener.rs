//! Sockets: who may have an address, and how a server ends.

mod support;

use std::{rc::Rc, time::Duration};

use backtide_export::{BindError, Client, ClientError, Export, Limits, Listener, NbdAddress, NbdError};
use backtide_socket::{SocketMode, Sockets};
use support::{Fixed, GRACE, Manual, Place, Raw, on_a_worker, settle};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

const WRITE: u16 = 1;
const FLUSH: u16 = 3;

async fn connect(place: &Place, export: &str) -> Raw<UnixStream> {
    Raw::open(UnixStream::connect(place.path("socket")).await.unwrap(), export).await
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    on_a_worker(async {
        let place = Place::new();
        drop(std::os::unix::net::UnixListener::bind(place.path("socket")).unwrap());
        assert!(place.path("socket").exists());
        let server = place.serve(Manual::new("disk")).await;
        let error = Listener::bind(&place.address()).await.unwrap_err();
        assert!(matches!(error, BindError::InUse(_)), "{error:?}");
        assert!(error.to_string().contains(place.path("socket").to_str().unwrap()), "{error}");
        connect(&place, "disk").await;
        server.shutdown(GRACE).await;
        assert!(!place.path("socket").exists());
    });
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    on_a_worker(async {
        let place = Place::new();
        std::fs::write(place.path("socket"), "precious").unwrap();
        let error = Listener::bind(&place.address()).await.unwrap_err();
        assert!(matches!(error, BindError::NotASocket(_)), "{error:?}");
        assert_eq!(std::fs::read(place.path("socket")).unwrap(), b"precious");
    });
}

#[test]
fn a_tcp_port_in_use_is_named() {
    on_a_worker(async {
        let address = NbdAddress::Tcp { host: "127.0.0.1".into(), port: 0 };
        let first = Listener::bind(&address).await.unwrap();
        let error = Listener::bind(first.address()).await.unwrap_err();
        assert!(matches!(&error, BindError::InUse(address) if address == first.address()));
        assert!(error.to_string().contains(&first.address().to_string()), "{error}");
    });
}

#[test]
fn somebody_elses_socket_is_not_removed() {
    on_a_worker(async {
        let place = Place::new();
        let server = place.serve(Manual::new("disk")).await;
        std::fs::remove_file(place.path("socket")).unwrap();
        let _theirs = std::os::unix::net::UnixListener::bind(place.path("socket")).unwrap();
        server.shutdown(GRACE).await;
        assert!(place.path("socket").exists());
    });
}

#[test]
fn a_client_that_went_away_with_more_requests_than_may_be_under_way_is_gone() {
    on_a_worker(async {
        // Just as many as are let in, and more, of which the rest is not even read.
        for requests in [4, 5, 10_000] {
            let (place, disk) = (Place::new(), Manual::new("disk"));
            let handshake = Duration::from_millis(200);
            let limits = Limits { requests: 4, connections: 1, handshake, ..Limits::default() };
            let server = place.serve_all(Fixed::one(disk.clone()), limits).await;
            let mut client = connect(&place, "disk").await;
            // What the socket does not take is not sent.
            for cookie in 0..requests {
                let sent = client.send(FLUSH, cookie, 0, 0);
                let full = async {
                    for _ in 0..20 {
                        settle().await
                    }
                };
                tokio::select! { () = sent => {} () = full => break }
            }
            disk.until_waiting(4).await;
            assert_eq!(server.connections(), 1);
            drop(client);
            for _ in 0..100 {
                settle().await;
            }
            assert_eq!(server.connections(), 0, "{requests} requests");
            assert_eq!(disk.waiting(), 4, "they are done all the same");
            // Its place is had by whoever comes when it has been away for as long as a handshake may take.
            while Client::connect(&place.uri("disk")).await.is_err() {
                settle().await;
            }
            assert_eq!(disk.waiting(), 4, "they are done all the same");
            server.shutdown(Duration::ZERO).await;
        }
    });
}

#[test]
fn shutdown_finishes_what_is_in_flight_and_refuses_what_comes() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let server = place.serve(disk.clone()).await;
        let mut busy = connect(&place, "disk").await;
        let mut idle = connect(&place, "disk").await;
        busy.send(FLUSH, 1, 0, 0).await;
        disk.until_waiting(1).await;
        assert_eq!(server.connections(), 2);
        let down = tokio::task::spawn_local(server.shutdown(GRACE));
        assert!(idle.is_closed().await);
        settle().await;
        assert!(!down.is_finished());
        for cookie in 2..100 {
            busy.send(WRITE, cookie, 0, 5000).await;
            assert_eq!(busy.reply(0).await, (cookie, Err(NbdError::Shutdown)));
        }
        disk.answer();
        assert_eq!(busy.reply(0).await, (1, Ok(vec![])));
        assert!(busy.is_closed().await);
        down.await.unwrap();
        assert_eq!(disk.submitted(), 1, "nothing was let in after the request to stop");
    });
}

#[test]
fn a_hand_over_finishes_what_is_in_flight_and_answers_nothing_else() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let server = place.serve(disk.clone()).await;
        let mut busy = connect(&place, "disk").await;
        busy.send(FLUSH, 1, 0, 0).await;
        disk.until_waiting(1).await;
        let down = tokio::task::spawn_local(server.hand_over(GRACE));
        settle().await;
        busy.send(FLUSH, 2, 0, 0).await;
        settle().await;
        disk.answer();
        assert_eq!(busy.reply(0).await, (1, Ok(vec![])));
        assert!(busy.is_closed().await, "the successor will answer the rest");
        down.await.unwrap();
        assert_eq!(disk.submitted(), 1);
    });
}

#[test]
fn a_client_in_its_handshake_is_told_that_the_server_is_going_down() {
    on_a_worker(async {
        let place = Place::new();
        let server = place.serve(Manual::new("disk")).await;
        let mut stream = UnixStream::connect(place.path("socket")).await.unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await.unwrap();
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x03\0\0\0\0").await.unwrap();
        server.shutdown(GRACE).await;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer[12..16], 0x8000_0007_u32.to_be_bytes(), "ERR_SHUTDOWN");
    });
}

#[test]
fn shutdown_does_not_wait_for_ever() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let server = place.serve(disk.clone()).await;
        let mut client = connect(&place, "disk").await;
        client.send(FLUSH, 1, 0, 0).await;
        disk.until_waiting(1).await;
        server.shutdown(Duration::ZERO).await;
        assert!(client.is_closed().await);
        disk.answer();
    });
}

#[test]
fn closing_one_export_leaves_the_others() {
    on_a_worker(async {
        let (place, one, two) = (Place::new(), Manual::new("one"), Manual::new("two"));
        let exports: Vec<(String, Rc<dyn Export>)> =
            vec![("one".into(), one.clone()), ("two".into(), two.clone())];
        let server = place.serve_all(Rc::new(Fixed(exports)), Limits::default()).await;
        let mut of_one = connect(&place, "one").await;
        let mut of_default = connect(&place, "").await;
        let mut of_two = connect(&place, "two").await;
        settle().await;
        assert_eq!((server.connections_of("one"), server.connections_of("two")), (2, 1));
        server.close_export("one", GRACE).await;
        assert!(of_one.is_closed().await && of_default.is_closed().await);
        of_two.send(FLUSH, 1, 0, 0).await;
        two.until_waiting(1).await;
        two.answer();
        assert_eq!(of_two.reply(0).await, (1, Ok(vec![])));
        assert_eq!(server.connections(), 1);
    });
}

#[test]
fn clients_beyond_the_limit_are_told_so_and_served_later() {
    on_a_worker(async {
        let place = Place::new();
        let limits = Limits { connections: 2, ..Limits::default() };
        let server = place.serve_all(Fixed::one(Manual::new("disk")), limits).await;
        let first = connect(&place, "disk").await;
        let _second = connect(&place, "disk").await;
        let refused = Client::connect(&place.uri("disk")).await.unwrap_err();
        let ClientError::Protocol(reason) = refused else { panic!("{refused:?}") };
        assert!(reason.to_string().contains("as many clients as it may"), "{reason}");
        drop(first);
        while server.connections() > 1 {
            tokio::task::yield_now().await;
        }
        connect(&place, "disk").await;
    });
}

#[test]
fn whether_an_address_is_free_is_told_and_nothing_listens_there_afterwards() {
    on_a_worker(async {
        let place = Place::new();
        let (uri, socket) = (place.uri("disk"), place.path("socket"));
        let sockets = Sockets::default();
        let check = async |purpose| Listener::check_kept(&uri, SocketMode::PRIVATE, &sockets, purpose).await;
        check("ours").await.unwrap();
        assert!(!socket.exists());
        let theirs = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(matches!(check("ours").await, Err(BindError::InUse(_))));
        drop(theirs);
        // What is kept for it is its own.
        let ours = Listener::bind_kept(&uri, SocketMode::PRIVATE, &sockets, "ours").await.unwrap();
        check("ours").await.unwrap();
        assert!(matches!(check("another").await, Err(BindError::InUse(_))));
        drop(ours);
        check("ours").await.unwrap();
    });
}
