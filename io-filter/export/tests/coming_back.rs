//! Clients that had the export open before, and others that only look at it.

mod support;

use backtide_export::{Client, Limits, Listener, NbdAddress, NbdUri, Peer, Server};
use backtide_units::{ByteCount, ByteOffset};
use bytes::Bytes;
use support::{FileExport, Fixed, Place, on_a_worker, settle};

/// A client that is served.
async fn client(server: &Server, uri: &NbdUri) -> Client {
    let client = Client::connect(uri).await.unwrap();
    while server.connections() == 0 {
        settle().await;
    }
    client
}

/// Waits until nobody is served any more.
async fn deserted(server: &Server) {
    while server.connections() > 0 {
        settle().await;
    }
}

#[test]
fn of_a_host_whoever_writes_is_back_and_not_who_only_looks() {
    on_a_worker(async {
        let place = Place::new();
        let export = FileExport::open("disk", &place.image(1 << 20), false).unwrap();
        let listener = Listener::bind(&NbdAddress::Tcp { host: "127.0.0.1".into(), port: 0 }).await.unwrap();
        let server = listener.serve(Fixed::one(export), Limits::default());
        let uri = NbdUri { address: server.address().clone(), export: "disk".into(), tls: None };
        let (guest, other) = (Peer::Host([127, 0, 0, 1].into()), Peer::Host([192, 0, 2, 1].into()));
        let both = [guest.clone(), other.clone()];
        server.expect(both.clone().into());

        let looks = client(&server, &uri).await;
        looks.read(ByteOffset(0), ByteCount(4096)).await.unwrap();
        looks.block_status(ByteOffset(0), ByteCount(4096)).await.unwrap();
        assert_eq!(server.expected(), [other.clone()].into(), "whoever is there is not awaited");
        drop(looks);
        deserted(&server).await;
        assert_eq!(server.expected(), both.into());

        let writes = client(&server, &uri).await;
        writes.write(ByteOffset(0), Bytes::from_static(&[1; 4096]), false).await.unwrap();
        drop(writes);
        deserted(&server).await;
        assert_eq!(server.expected(), [other].into());
        server.expect([guest].into());
        let flushes = client(&server, &uri).await;
        flushes.flush().await.unwrap();
        drop(flushes);
        deserted(&server).await;
        assert_eq!(server.expected(), [].into());
    });
}

#[test]
fn a_process_is_back_when_it_connects() {
    on_a_worker(async {
        let place = Place::new();
        let server = place.serve(FileExport::open("disk", &place.image(1 << 20), false).unwrap()).await;
        let first = client(&server, &place.uri("disk")).await;
        let own = server.clients();
        let Some(Peer::Process { id, .. }) = own.first() else { panic!("{own:?}") };
        server.expect([Peer::Process { id: *id, started: 0 }].into());
        assert_eq!(server.expected(), [].into(), "it is there, whenever it was started");
        drop(first);
        deserted(&server).await;
        server.expect(own.clone());
        assert_eq!(server.expected(), own);
        drop(client(&server, &place.uri("disk")).await);
        deserted(&server).await;
        assert_eq!(server.expected(), [].into());
    });
}
