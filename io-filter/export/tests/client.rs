//! The client: against our server, and against servers nobody here wrote.

mod support;

use std::{process::Stdio, time::Duration};

use backtide_export::{
    BlockSizes, Client, ClientError, ClientOptions, ExportInfo, Extent, NbdAddress, NbdError, NbdUri,
    ZeroOptions, list_exports,
};
use backtide_units::{ByteCount, ByteOffset};
use bytes::Bytes;
use support::{FileExport, GRACE, Manual, Place, command, on_a_worker, run};
use tokio::process::Child;

const MIB: u64 = 1 << 20;

/// Bytes that repeat with a period no block size has.
fn noise(length: u64) -> Bytes {
    let period: Vec<u8> = (0..65_537_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut bytes = period.repeat(length as usize / period.len() + 1);
    bytes.truncate(length as usize);
    bytes.into()
}

fn at(offset: u64) -> ByteOffset {
    ByteOffset(offset)
}

fn bytes(count: u64) -> ByteCount {
    ByteCount(count)
}

/// Writes, reads, zeroes and asks; every server has to pass.
async fn use_all_of_it(client: &Client) {
    let size = client.size().0;
    let data = noise(40 * MIB);
    client.write(at(4096), data.clone(), false).await.unwrap();
    client.write(at(size - 4096), data.slice(..4096), true).await.unwrap();
    assert!(client.read(at(4096), bytes(40 * MIB)).await.unwrap() == data, "split reads");
    let odd = client.read(at(5001), bytes(70_001)).await.unwrap();
    assert!(odd == data.slice(905..905 + 70_001), "a read that is not aligned");
    client.flush().await.unwrap();
    let how = ZeroOptions { fua: true, ..ZeroOptions::default() };
    client.write_zeroes(at(MIB), bytes(2 * MIB), how).await.unwrap();
    let zeroes = client.read(at(MIB), bytes(2 * MIB)).await.unwrap();
    assert!(zeroes.iter().all(|&byte| byte == 0));
    if client.flags().trim() {
        client.trim(at(4 * MIB), bytes(MIB), false).await.unwrap();
    }
    let extents = client.block_status(at(0), bytes(size)).await.unwrap();
    assert_eq!(extents.iter().map(|extent| extent.length.0).sum::<u64>(), size);
    if client.has_block_status() {
        assert!(extents.len() > 1, "{extents:?}");
        let part = client.block_status(at(100), bytes(1000)).await.unwrap();
        assert_eq!(part.iter().map(|extent| extent.length.0).sum::<u64>(), 1000);
    }
    let beyond = client.read(at(size - 10), bytes(11)).await.unwrap_err();
    assert!(matches!(beyond, ClientError::OutOfRange { .. }), "{beyond}");
    assert!(client.read(at(u64::MAX), bytes(10)).await.is_err());
    assert!(client.read(at(size), bytes(0)).await.unwrap().is_empty());
    assert!(client.lost().is_none());
}

#[test]
fn everything_works_with_our_server() {
    on_a_worker(async {
        let place = Place::new();
        let disk = FileExport::open("disk", &place.image(64 * MIB), false).unwrap();
        let server = place.serve(disk).await;
        use_all_of_it(&Client::connect(&place.uri("disk")).await.unwrap()).await;
        let listed = list_exports(&place.uri(""), &ClientOptions::default()).await.unwrap();
        assert_eq!(listed[0].name, "disk");
        server.shutdown(GRACE).await;
    });
}

/// Connects to a foreign server, which does not say when it listens: knocks until it answers.
async fn knock(server: &mut Child, uri: &NbdUri) -> Client {
    loop {
        match Client::connect(uri).await {
            Ok(client) => return client,
            Err(ClientError::Connect { .. }) => tokio::task::yield_now().await,
            Err(error) => panic!("{uri}: {error}"),
        }
        if let Some(status) = server.try_wait().unwrap() {
            panic!("the server ended before it answered: {status}");
        }
    }
}

#[test]
fn everything_works_with_nbdkit() {
    on_a_worker(async {
        // As it is; without zeroes, trim and FUA; with old handshakes; with coarse blocks.
        for (variant, filters) in [
            ("whole", &["memory", "64M"][..]),
            ("poor", &["--filter=nozero", "--filter=fua", "memory", "64M", "zeromode=none"]),
            ("simple", &["--no-sr", "memory", "64M"]),
            ("plain", &["--mask-handshake=0", "memory", "64M"]),
            (
                "coarse",
                &[
                    "--filter=blocksize-policy",
                    "memory",
                    "64M",
                    "blocksize-minimum=4096",
                    "blocksize-maximum=1M",
                    "blocksize-error-policy=error",
                ],
            ),
        ] {
            let place = Place::new();
            let socket = place.path("socket");
            let mut nbdkit = command("nbdkit");
            nbdkit.args(["--foreground", "--unix"]).arg(&socket).args(filters);
            let mut server = nbdkit.stderr(Stdio::inherit()).spawn().unwrap();
            let client = knock(&mut server, &place.uri("")).await;
            if variant == "coarse" {
                assert_eq!((client.block_sizes().minimum, client.block_sizes().maximum), (4096, 1 << 20));
                let odd = client.write(at(512), noise(4096), false).await.unwrap_err();
                assert!(matches!(odd, ClientError::Misaligned { minimum: 4096, .. }), "{odd}");
            }
            if variant == "poor" {
                assert!(!client.flags().fua() && !client.flags().write_zeroes());
            }
            use_all_of_it(&client).await;
            drop(client);
            server.kill().await.unwrap();
        }
    });
}

#[test]
fn a_qcow2_behind_qemu_nbd_is_a_disk_like_any_other() {
    on_a_worker(async {
        let place = Place::new();
        let image = place.path("disk.qcow2");
        let image = image.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", image, "64M"]).await;
        let mut server = command("qemu-nbd");
        server.args(["--persistent", "--discard=unmap", "--format=qcow2", "--socket"]);
        let mut server = server.arg(place.path("socket")).arg(image).spawn().unwrap();
        let client = knock(&mut server, &place.uri("")).await;
        assert!(client.flags().block_status_payload(), "extended headers were not negotiated");
        use_all_of_it(&client).await;
        drop(client);
        server.kill().await.unwrap();
    });
}

#[test]
fn many_requests_are_in_flight_at_once_and_bounded() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let server = place.serve(disk.clone()).await;
        let options = ClientOptions { requests: 5, ..ClientOptions::default() };
        let client = Client::connect_with(&place.uri(""), options).await.unwrap();
        let reads: Vec<_> = (0..20)
            .map(|number| {
                let client = client.clone();
                let read = async move { client.read(at(number * 512), bytes(512)).await };
                tokio::spawn(read)
            })
            .collect();
        disk.until_waiting(5).await;
        support::settle().await;
        assert_eq!(disk.submitted(), 5);
        while disk.submitted() < 20 || disk.waiting() > 0 {
            if disk.waiting() > 0 {
                disk.answer();
            }
            tokio::task::yield_now().await;
        }
        for read in reads {
            assert_eq!(read.await.unwrap().unwrap().len(), 512);
        }
        drop(client);
        server.shutdown(GRACE).await;
    });
}

#[test]
fn a_lost_connection_fails_everything_in_flight_and_after() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let server = place.serve(disk.clone()).await;
        let client = Client::connect(&place.uri("")).await.unwrap();
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let client = client.clone();
                tokio::spawn(async move { client.write(at(0), noise(512), false).await })
            })
            .collect();
        disk.until_waiting(3).await;
        server.shutdown(Duration::ZERO).await;
        for waiting in waiting {
            assert!(waiting.await.unwrap().unwrap_err().is_lost());
        }
        assert!(client.flush().await.unwrap_err().is_lost());
        assert!(client.lost().is_some());
    });
}

#[test]
fn a_runtime_that_ends_fails_what_other_threads_wait_for() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let waiting = tokio::task::LocalSet::new().block_on(&runtime, async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let server = place.serve(disk.clone()).await;
        let client = Client::connect(&place.uri("")).await.unwrap();
        let (kept, handle) = (client.clone(), tokio::runtime::Handle::current());
        let waiting = std::thread::spawn(move || handle.block_on(kept.read(at(0), bytes(512))));
        disk.until_waiting(1).await;
        // It never answers.
        std::mem::forget((server, disk));
        waiting
    });
    drop(runtime);
    assert!(waiting.join().unwrap().unwrap_err().is_lost());
}

#[test]
fn a_server_that_says_it_is_shutting_down_is_asked_for_nothing_more_and_told_good_bye() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let server = place.serve(disk.clone()).await;
        let client = Client::connect(&place.uri("")).await.unwrap();
        let write = |number| {
            let client = client.clone();
            tokio::spawn(async move { client.write(at(number), noise(512), false).await })
        };
        let (first, refused) = (write(0), write(512));
        disk.until_waiting(2).await;
        disk.take_last().1.fail(NbdError::Shutdown);
        let error = refused.await.unwrap().unwrap_err();
        assert!(error.is_lost() && error.as_nbd() == NbdError::Io, "{error:?}");
        assert!(matches!(client.lost(), Some(ClientError::ShuttingDown)));
        assert!(client.flush().await.unwrap_err().is_lost());
        assert_eq!((server.connections(), disk.submitted()), (1, 2));
        // What it has taken it may still do: nobody else must do it meanwhile.
        disk.answer();
        first.await.unwrap().unwrap();
        while server.connections() > 0 {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn the_last_clone_says_good_bye() {
    on_a_worker(async {
        let place = Place::new();
        let server = place.serve(Manual::new("disk")).await;
        let client = Client::connect(&place.uri("")).await.unwrap();
        let clone = client.clone();
        drop(client);
        support::settle().await;
        assert_eq!(server.connections(), 1);
        drop(clone);
        while server.connections() > 0 {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn long_requests_are_split_to_what_the_server_takes() {
    on_a_worker(async {
        let place = Place::new();
        let mut info = ExportInfo::new("disk", bytes(1 << 40));
        info.block_sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 65_536 };
        let disk = Manual::with(info);
        let server = place.serve(disk.clone()).await;
        let client = Client::connect(&place.uri("")).await.unwrap();
        let zero = client.clone();
        let long =
            tokio::spawn(
                async move { zero.write_zeroes(at(512), bytes(5 << 30), ZeroOptions::default()).await },
            );
        disk.until_waiting(1).await;
        let (whole, reply) = disk.take();
        assert_eq!(whole.range().count().0, 5 << 30, "lengths have 64 bits");
        // A server that does not like it so long gets it in pieces.
        reply.fail(NbdError::Overflow);
        let write = client.clone();
        let write = tokio::spawn(async move { write.write(at(0), noise(200_192), false).await });
        disk.until_waiting(6 + 4).await;
        let mut total = 0;
        for _ in 0..10 {
            let (command, reply) = disk.take();
            total += command.range().count().0;
            reply.done();
        }
        assert_eq!(total, (5 << 30) + 200_192);
        long.await.unwrap().unwrap();
        write.await.unwrap().unwrap();
        let odd = client.write(at(100), noise(512), false).await.unwrap_err();
        assert!(matches!(odd, ClientError::Misaligned { .. }));
        drop(client);
        server.shutdown(GRACE).await;
    });
}

#[test]
fn errors_of_the_server_say_what_failed_where_and_leave_the_connection() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let server = place.serve(disk.clone()).await;
        let client = Client::connect(&place.uri("")).await.unwrap();
        let answer = async {
            disk.until_waiting(1).await;
            disk.take().1.fail_with(NbdError::Io, "the platter is dusty");
        };
        let (result, ()) = tokio::join!(client.read(at(512), bytes(512)), answer);
        let error = result.unwrap_err();
        assert_eq!(error.as_nbd(), NbdError::Io);
        assert!(!error.is_lost());
        let text = error.to_string();
        assert!(text.contains("512..1024") && text.contains("the platter is dusty"), "{text}");
        let answer = async {
            disk.until_waiting(1).await;
            disk.take().1.extents(&[Extent::hole(bytes(1 << 40))]);
        };
        let (result, ()) = tokio::join!(client.block_status(at(5), bytes(10)), answer);
        assert_eq!(result.unwrap(), [Extent::hole(bytes(10))]);
        drop(client);
        server.shutdown(GRACE).await;
    });
}

#[test]
fn a_server_that_cannot_be_used_is_named() {
    on_a_worker(async {
        let place = Place::new();
        let nobody = Client::connect(&place.uri("disk")).await.unwrap_err();
        assert!(matches!(nobody, ClientError::Connect { .. }), "{nobody:?}");
        assert!(nobody.to_string().contains(place.path("socket").to_str().unwrap()));
        let exports = support::Fixed(vec![]);
        let server = place.serve_all(std::rc::Rc::new(exports), Default::default()).await;
        let unknown = Client::connect(&place.uri("disk")).await.unwrap_err();
        let ClientError::Protocol(reason) = unknown else { panic!("{unknown:?}") };
        assert!(reason.to_string().contains("no export \"disk\""), "{reason}");
        server.shutdown(GRACE).await;
    });
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_given_up() {
    let place = Place::new();
    let _silent = tokio::net::UnixListener::bind(place.path("socket")).unwrap();
    let error = Client::connect(&place.uri("disk")).await.unwrap_err();
    assert!(matches!(error, ClientError::HandshakeTimeout { .. }), "{error:?}");
    assert!(matches!(place.address(), NbdAddress::Unix(_)));
}
