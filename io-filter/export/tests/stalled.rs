//! A server over TCP that takes nothing more, because its storage stands still, and whose host says so.

mod support;

use std::time::Duration;

use backtide_export::{Client, ClientOptions, Limits, Listener, NbdAddress, NbdUri};
use backtide_units::{ByteCount, ByteOffset};
use bytes::Bytes;
use support::{Fixed, GRACE, Manual, on_a_worker};

const MIB: u64 = 1 << 20;

#[test]
fn a_server_that_takes_nothing_more_is_left_to_take_long() {
    on_a_worker(async {
        let disk = Manual::new("disk");
        let listener = Listener::bind(&NbdAddress::Tcp { host: "127.0.0.1".into(), port: 0 }).await.unwrap();
        let uri = NbdUri { address: listener.address().clone(), export: "disk".into(), tls: None };
        let few = Limits { bytes: ByteCount(MIB), ..Limits::default() };
        let server = listener.serve(Fixed::one(disk.clone()), few);
        // Longer than a host that is there leaves a question unanswered.
        let silence = Duration::from_millis(2500);
        let options = ClientOptions { host_silence: silence, ..ClientOptions::default() };
        let client = Client::connect_with(&uri, options).await.unwrap();
        // More than both kernels keep for a connection.
        let data = Bytes::from(vec![7; 1 << 20]);
        let mut writes = tokio::task::JoinSet::new();
        for number in 0..48 {
            let (client, data) = (client.clone(), data.clone());
            writes.spawn(async move { client.write(ByteOffset(number * MIB), data, false).await });
        }
        let ended = tokio::time::timeout(silence + silence / 2, writes.join_next()).await;
        assert!(ended.is_err(), "what nobody answered has ended: {ended:?}, {:?}", client.lost());
        assert!(disk.submitted() < 8, "the server took {} requests: it stopped no one", disk.submitted());
        while !writes.is_empty() {
            if disk.waiting() > 0 {
                disk.answer();
            }
            match writes.try_join_next() {
                Some(written) => written.unwrap().unwrap(),
                None => tokio::task::yield_now().await,
            }
        }
        drop(client);
        server.shutdown(GRACE).await;
    });
}
