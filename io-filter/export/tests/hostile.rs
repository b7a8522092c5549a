//! Clients that mean no good, or are merely broken: each harms nobody but itself.

mod support;

use std::{collections::VecDeque, rc::Rc, time::Duration};

use backtide_export::{Client, ClientError, Export, Limits, ServeError, serve_connection};
use backtide_units::{ByteCount, ByteOffset};
use bytes::Bytes;
use support::{FileExport, Fixed, GRACE, Manual, Place, Raw, on_a_worker, settle};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::LocalSet,
};

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

async fn knock(place: &Place) -> UnixStream {
    UnixStream::connect(place.path("socket")).await.unwrap()
}

/// Reads a client's way to its end: the server has closed it.
async fn until_closed(mut stream: UnixStream) {
    let mut rest = Vec::new();
    // Closed with bytes unread is an error here; both are the end.
    let _ = stream.read_to_end(&mut rest).await;
}

#[test]
fn thousands_of_idle_connections_lock_nobody_out() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let limits = Limits { connections: 4, handshakes: 8, ..Limits::default() };
        let server = place.serve_all(Fixed::one(disk.clone()), limits).await;
        let served = Client::connect(&place.uri("disk")).await.unwrap();
        let mut idle = VecDeque::new();
        for number in 0..3000 {
            idle.push_back(knock(&place).await);
            tokio::task::yield_now().await;
            if idle.len() > 300 {
                idle.pop_front();
            }
            assert!(server.handshakes() <= 8);
            if number % 500 == 0 {
                // Somebody who means it gets in, whoever else knocks.
                drop(Client::connect(&place.uri("disk")).await.unwrap());
            }
        }
        settle().await;
        assert!(server.handshakes() <= 8);
        let (flushed, ()) = tokio::join!(served.flush(), async {
            disk.until_waiting(1).await;
            disk.answer();
        });
        flushed.expect("the client that was there first is served as ever");
        // The first of those left had to give way long ago.
        until_closed(idle.pop_front().unwrap()).await;
        drop(served);
        server.shutdown(GRACE).await;
    });
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_trickles_is_cut_off_in_time() {
    let local = LocalSet::new();
    let limits = Limits { handshake: Duration::from_secs(10), ..Limits::default() };
    local
        .run_until(async {
            let (mut theirs, ours) = tokio::io::duplex(1 << 16);
            let exports = Fixed::one(Manual::new("disk"));
            let started = tokio::time::Instant::now();
            let served = tokio::task::spawn_local(serve_connection(ours, exports, limits));
            // A byte a second: each one alone is in time.
            let hello = [&3_u32.to_be_bytes()[..], &[b'I'; 100]].concat();
            for byte in hello {
                if theirs.write_all(&[byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            let result = served.await.unwrap();
            assert!(matches!(result, Err(ServeError::HandshakeTimeout(_))), "{result:?}");
            assert!(started.elapsed() < Duration::from_secs(12), "{:?}", started.elapsed());
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_reads_its_replies_is_dropped_in_time() {
    let local = LocalSet::new();
    let limits = Limits { stalled: Duration::from_secs(20), ..Limits::default() };
    local
        .run_until(async {
            let (theirs, ours) = tokio::io::duplex(1000);
            let exports = Fixed::one(Zeroes::new());
            let served = tokio::task::spawn_local(serve_connection(ours, exports, limits));
            let mut client = Raw::open(theirs, "").await;
            client.send(READ, 1, 0, 4000).await;
            // As long as it takes something now and then it is served.
            for _ in 0..4 {
                tokio::time::sleep(Duration::from_secs(15)).await;
                client.stream.read_exact(&mut [0; 100]).await.unwrap();
            }
            let stopped = tokio::time::Instant::now();
            let result = served.await.unwrap();
            assert!(matches!(result, Err(ServeError::Stalled(_))), "{result:?}");
            assert!(stopped.elapsed() <= Duration::from_secs(20), "{:?}", stopped.elapsed());
        })
        .await;
}

/// A disk that answers every read at once.
struct Zeroes(backtide_export::ExportInfo);

impl Zeroes {
    fn new() -> Rc<Self> {
        Rc::new(Self(backtide_export::ExportInfo::new("disk", ByteCount(1 << 30))))
    }
}

impl Export for Zeroes {
    fn info(&self) -> backtide_export::ExportInfo {
        self.0.clone()
    }

    fn submit(&self, command: backtide_export::Command, reply: backtide_export::Reply) {
        match command {
            backtide_export::Command::Read { length, .. } => reply.data(vec![0; length.0 as usize].into()),
            _ => reply.done(),
        }
    }
}

#[test]
fn a_client_that_never_reads_stalls_only_itself() {
    on_a_worker(async {
        let place = Place::new();
        let server = place.serve(Zeroes::new()).await;
        let mut greedy = Vec::new();
        for _ in 0..8 {
            let mut client = Raw::open(knock(&place).await, "disk").await;
            for cookie in 0..500 {
                client.send(READ, cookie, 0, 32 << 20).await;
            }
            greedy.push(client);
        }
        settle().await;
        let client = Client::connect(&place.uri("disk")).await.unwrap();
        for _ in 0..100 {
            let read = client.read(ByteOffset(0), ByteCount(4096)).await.unwrap();
            assert_eq!(read.len(), 4096);
        }
        drop((greedy, client));
        server.shutdown(GRACE).await;
    });
}

#[test]
fn everything_may_arrive_one_byte_at_a_time() {
    on_a_worker(async {
        let disk = Manual::new("disk");
        // A stream that holds one byte: nothing ever comes together.
        let (theirs, ours) = tokio::io::duplex(1);
        let exports = Fixed::one(disk.clone());
        tokio::task::spawn_local(serve_connection(ours, exports, Limits::default()));
        let mut client = Raw::open(theirs, "").await;
        let answering = Rc::clone(&disk);
        tokio::task::spawn_local(async move {
            loop {
                answering.until_waiting(1).await;
                answering.answer();
            }
        });
        client.send(WRITE, 1, 512, 700).await;
        assert_eq!(client.reply(0).await, (1, Ok(vec![])));
        client.send(READ, 2, 512, 700).await;
        assert_eq!(client.reply(700).await, (2, Ok(vec![0; 700])));
        client.send(FLUSH, 3, 0, 0).await;
        assert_eq!(client.reply(0).await, (3, Ok(vec![])));
    });
}

#[test]
fn a_client_that_breaks_the_protocol_is_dropped_and_the_others_are_not() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let server = place.serve(disk.clone()).await;
        let client = Client::connect(&place.uri("disk")).await.unwrap();
        for garbage in [
            &b"GET / HTTP/1.1\r\nHost: disk\r\n\r\n"[..],
            &[0; 100],
            &[0xff; 100_000],
            &[&3_u32.to_be_bytes()[..], b"IHAVEOPT\0\0\0\x01\xff\xff\xff\xff"].concat(),
            &[&3_u32.to_be_bytes()[..], &b"IHAVEOPT\0\0\0\x05\0\0\0\0".repeat(5000)].concat(),
        ] {
            let mut stream = knock(&place).await;
            let (mut reader, mut writer) = stream.split();
            let mut answers = Vec::new();
            // The server may close before it has read it all.
            let (_, _) = tokio::join!(writer.write_all(garbage), reader.read_to_end(&mut answers));
        }
        // And one that is past its handshake.
        let mut late = Raw::open(knock(&place).await, "disk").await;
        late.stream.write_all(&[0x11; 28]).await.unwrap();
        assert!(late.is_closed().await);
        let (flushed, ()) = tokio::join!(client.flush(), async {
            disk.until_waiting(1).await;
            disk.answer();
        });
        flushed.unwrap();
        drop(client);
        server.shutdown(GRACE).await;
    });
}

#[test]
fn under_load_an_orderly_end_loses_nothing_that_was_answered() {
    on_a_worker(async {
        let place = Place::new();
        let image = place.image(64 << 20);
        let server = place.serve(FileExport::open("disk", &image, false).unwrap()).await;
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(Client::connect(&place.uri("disk")).await.unwrap());
        }
        let writes: Vec<_> = (0..4000_u64)
            .map(|number| {
                let client = clients[number as usize % 4].clone();
                let data = Bytes::from(vec![number as u8 | 1; 4096]);
                tokio::spawn(async move { client.write(ByteOffset(number * 4096), data, false).await })
            })
            .collect();
        // Half way through, whenever that is.
        let written = |number: u64| {
            let mut byte = [0];
            let file = std::fs::File::open(&image).unwrap();
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, number * 4096).unwrap();
            byte[0] == number as u8 | 1
        };
        while !written(1000) {
            tokio::task::yield_now().await;
        }
        server.shutdown(GRACE).await;
        let (mut done, mut refused) = (0, 0);
        for (number, write) in writes.into_iter().enumerate() {
            match write.await.unwrap() {
                Ok(()) => {
                    assert!(written(number as u64), "write {number} was answered");
                    done += 1;
                }
                Err(ClientError::ShuttingDown) => refused += 1,
                Err(error) => assert!(error.is_lost(), "write {number}: {error}"),
            }
        }
        assert!(done > 0, "{done} done, {refused} refused");
    });
}
