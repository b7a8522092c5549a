//! One connection of the server: pipelining, limits, ends.

mod support;

use std::{rc::Rc, time::Duration};

use backtide_export::{Client, Limits, NbdError, ServeError, serve_connection};
use backtide_units::{ByteCount, ByteOffset};
use bytes::Bytes;
use support::{Fixed, Manual, Place, Raw, on_a_worker, settle};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    task::JoinHandle,
};

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;

type Served = JoinHandle<Result<(), ServeError>>;

/// A raw client of `export`, and the task that serves it.
async fn connect(export: &Rc<Manual>, limits: Limits) -> (Raw<DuplexStream>, Served) {
    let (theirs, ours) = tokio::io::duplex(1 << 20);
    let exports = Fixed::one(export.clone());
    let served = tokio::task::spawn_local(serve_connection(ours, exports, limits));
    (Raw::open(theirs, "").await, served)
}

#[test]
fn requests_are_in_flight_together_and_answered_in_any_order() {
    on_a_worker(async {
        let disk = Manual::new("disk");
        let (mut client, _served) = connect(&disk, Limits::default()).await;
        client.send(READ, 1, 0, 10).await;
        client.send(WRITE, 2, 4096, 5000).await;
        client.send(FLUSH, 3, 0, 0).await;
        disk.until_waiting(3).await;
        let (_, flush) = disk.take_last();
        let (write, written) = disk.take_last();
        let (_, read) = disk.take_last();
        let backtide_export::Command::Write { data, .. } = write else { panic!("{write:?}") };
        assert!(data.len() == 5000 && data.iter().all(|&byte| byte == 7));
        flush.done();
        written.fail(NbdError::NoSpace);
        read.data(vec![9; 10].into());
        assert_eq!(client.reply(0).await, (3, Ok(vec![])));
        assert_eq!(client.reply(0).await, (2, Err(NbdError::NoSpace)));
        assert_eq!(client.reply(10).await, (1, Ok(vec![9; 10])));
    });
}

#[test]
fn a_reply_that_is_dropped_answers_with_shutdown() {
    on_a_worker(async {
        let disk = Manual::new("disk");
        let (mut client, _served) = connect(&disk, Limits::default()).await;
        client.send(READ, 1, 0, 10).await;
        disk.until_waiting(1).await;
        drop(disk.take());
        assert_eq!(client.reply(10).await, (1, Err(NbdError::Shutdown)));
    });
}

#[test]
fn no_more_requests_are_let_in_than_the_limit() {
    on_a_worker(async {
        let disk = Manual::new("disk");
        let (mut client, _served) = connect(&disk, Limits { requests: 4, ..Limits::default() }).await;
        for cookie in 0..50 {
            client.send(FLUSH, cookie, 0, 0).await;
        }
        for done in 0..50 {
            settle().await;
            assert_eq!(disk.submitted(), (done + 4).min(50), "after {done} were answered");
            disk.answer();
            assert_eq!(client.reply(0).await, (done as u64, Ok(vec![])));
        }
    });
}

#[test]
fn no_more_bytes_are_let_in_than_the_limit_but_one_request_always_is() {
    on_a_worker(async {
        let disk = Manual::new("disk");
        let limits = Limits { bytes: ByteCount(10_000), ..Limits::default() };
        let (mut client, _served) = connect(&disk, limits).await;
        for cookie in 0..3 {
            client.send(WRITE, cookie, 0, 4000).await;
        }
        settle().await;
        assert_eq!(disk.submitted(), 2);
        client.send(WRITE, 3, 0, 20_000).await;
        for expected in [3, 3, 4] {
            disk.answer();
            settle().await;
            assert_eq!(disk.submitted(), expected);
        }
        // A long payload in a buffer of its own is not read before there is room for it.
        client.send(READ, 4, 0, 9000).await;
        client.send(WRITE, 5, 0, 200_000).await;
        disk.answer();
        settle().await;
        assert_eq!(disk.submitted(), 5);
        disk.answer();
        settle().await;
        for (cookie, data) in [(0, 0), (1, 0), (2, 0), (3, 0), (4, 9000)] {
            assert_eq!(client.reply(data).await.0, cookie);
        }
        settle().await;
        assert_eq!(disk.submitted(), 6);
    });
}

#[test]
fn a_client_that_never_reads_its_replies_is_held_at_the_limits() {
    on_a_worker(async {
        let disk = Manual::new("disk");
        let limits = Limits { bytes: ByteCount(8 << 20), ..Limits::default() };
        let (mut client, _served) = connect(&disk, limits).await;
        for cookie in 0..1000 {
            client.send(READ, cookie, 0, 1 << 20).await;
        }
        loop {
            settle().await;
            if disk.waiting() == 0 {
                break;
            }
            disk.answer();
        }
        // The stream between holds one more.
        assert!(disk.submitted() <= 8 + 2, "{} were let in", disk.submitted());
        assert_eq!(client.reply(1 << 20).await.0, 0);
    });
}

#[test]
fn refusals_are_held_at_the_limit_too() {
    on_a_worker(async {
        let disk = Manual::new("disk");
        let (theirs, ours) = tokio::io::duplex(100);
        let exports = Fixed::one(disk.clone());
        let limits = Limits { requests: 4, ..Limits::default() };
        let _served = tokio::task::spawn_local(serve_connection(ours, exports, limits));
        let mut client = Raw::open(theirs, "").await;
        let (mut reader, mut writer) = tokio::io::split(&mut client.stream);
        let mut bad = 0x2560_9513_u32.to_be_bytes().to_vec();
        bad.extend_from_slice(&[0; 24]);
        bad[7] = 99;
        // Both at once: the server stops reading when its answers are not read.
        let (_, answers) = tokio::join!(
            async {
                for _ in 0..1000 {
                    writer.write_all(&bad).await.unwrap();
                }
            },
            async {
                let mut answers = vec![0; 16 * 1000];
                reader.read_exact(&mut answers).await.unwrap();
                answers
            }
        );
        assert!(answers.chunks(16).all(|answer| answer[7] == 22));
    });
}

#[test]
fn after_disc_everything_in_flight_is_answered_and_the_connection_closed() {
    on_a_worker(async {
        let disk = Manual::new("disk");
        let (mut client, served) = connect(&disk, Limits::default()).await;
        client.send(FLUSH, 1, 0, 0).await;
        client.send(DISC, 0, 0, 0).await;
        client.send(FLUSH, 2, 0, 0).await;
        disk.until_waiting(1).await;
        settle().await;
        assert!(!served.is_finished());
        disk.answer();
        assert_eq!(client.reply(0).await, (1, Ok(vec![])));
        assert!(client.is_closed().await);
        served.await.unwrap().unwrap();
        assert_eq!(disk.submitted(), 1, "nothing after DISC");
    });
}

#[test]
fn a_client_that_vanishes_leaves_replies_that_may_still_be_completed() {
    on_a_worker(async {
        let disk = Manual::new("disk");
        let (mut client, served) = connect(&disk, Limits::default()).await;
        client.send(READ, 1, 0, 4096).await;
        disk.until_waiting(1).await;
        served.abort();
        settle().await;
        disk.answer();
        assert_eq!((disk.submitted(), disk.waiting()), (1, 0), "the one request, and it once");
        assert!(client.is_closed().await, "an answer that nobody is left to give is not given");
    });
}

#[test]
fn the_end_in_the_middle_of_a_message_is_told_from_the_end() {
    on_a_worker(async {
        for (cut, truncated) in [(0, false), (10, true), (28, true), (1000, true)] {
            let disk = Manual::new("disk");
            let (mut client, served) = connect(&disk, Limits::default()).await;
            let mut write = 0x2560_9513_u32.to_be_bytes().to_vec();
            write.extend_from_slice(&[0, 0, 0, 1]);
            write.extend_from_slice(&[0; 18]);
            write.extend_from_slice(&[0x10, 0]);
            write.resize(28 + 4096, 1);
            client.stream.write_all(&write[..cut]).await.unwrap();
            drop(client);
            let result = served.await.unwrap();
            assert_eq!(matches!(result, Err(ServeError::Truncated)), truncated, "at {cut}: {result:?}");
            assert_eq!(disk.submitted(), 0);
        }
    });
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    on_a_worker(async {
        let disk = Manual::new("disk");
        let (mut client, served) = connect(&disk, Limits::default()).await;
        client.stream.write_all(&[0x55; 28]).await.unwrap();
        assert!(client.is_closed().await);
        assert!(matches!(served.await.unwrap(), Err(ServeError::Protocol(_))));
    });
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_is_cut_off_in_time() {
    let local = tokio::task::LocalSet::new();
    let limits = Limits { handshake: Duration::from_secs(10), ..Limits::default() };
    local
        .run_until(async {
            let (_theirs, ours) = tokio::io::duplex(100);
            let exports = Fixed::one(Manual::new("disk"));
            let result = serve_connection(ours, exports, limits).await;
            assert!(matches!(result, Err(ServeError::HandshakeTimeout(_))), "{result:?}");
        })
        .await;
}

#[test]
fn the_text_of_an_error_reaches_the_client_whatever_it_asked_for() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let _server = place.serve(disk.clone()).await;
        let client = Client::connect(&place.uri("disk")).await.unwrap();
        let (written, ()) =
            tokio::join!(client.write(ByteOffset(0), Bytes::from_static(&[1; 512]), false), async {
                disk.until_waiting(1).await;
                disk.take().1.fail_with(NbdError::NoSpace, "the shelf is full");
            });
        assert!(written.unwrap_err().to_string().contains("the shelf is full"));
        let (read, ()) = tokio::join!(client.read(ByteOffset(0), ByteCount(512)), async {
            disk.until_waiting(1).await;
            disk.take().1.fail_with(NbdError::Io, "the shelf fell down");
        });
        assert!(read.unwrap_err().to_string().contains("the shelf fell down"));
    });
}
