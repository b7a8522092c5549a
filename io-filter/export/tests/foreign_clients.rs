//! The server judged by clients nobody here wrote.

mod support;

use backtide_export::NbdAddress;
use support::{FileExport, Fixed, GRACE, Place, command, on_a_worker, run, write_noise};

const SIZE: u64 = 64 << 20;

/// A served file and its URI.
async fn served(place: &Place) -> (backtide_export::Server, String) {
    let disk = FileExport::open("disk", &place.image(SIZE), false).unwrap();
    (place.serve(disk).await, place.uri("disk").to_string())
}

#[test]
fn nbdinfo_sees_the_export_as_it_is() {
    on_a_worker(async {
        let place = Place::new();
        let (server, uri) = served(&place).await;
        let shown = run("nbdinfo", &[&uri]).await;
        for line in [
            "using structured packets",
            "export-size: 67108864",
            "base:allocation",
            "is_read_only: false",
            "can_flush: true",
            "can_fua: true",
            "can_df: true",
            "can_trim: true",
            "can_zero: true",
            "can_cache: true",
            "can_multi_conn: true",
            "can_fast_zero: true",
            "block_size_minimum: 1",
            "block_size_preferred: 4096",
            "block_size_maximum: 33554432",
        ] {
            assert!(shown.contains(line), "{line:?} is not in {shown}");
        }
        let list = run("nbdinfo", &["--list", &place.uri("").to_string()]).await;
        assert!(list.contains("export=\"disk\""), "{list}");
        let unknown = place.uri("nope").to_string();
        let refused = command("nbdinfo").arg(&unknown).output().await.unwrap();
        assert!(!refused.status.success());
        server.shutdown(GRACE).await;
    });
}

#[test]
fn several_exports_share_a_socket_and_one_of_them_is_the_default() {
    on_a_worker(async {
        let place = Place::new();
        let mut exports: Vec<(String, std::rc::Rc<dyn backtide_export::Export>)> = Vec::new();
        for (name, megabytes) in [("first", 1_u64), ("second", 2), ("third", 3)] {
            let path = place.path(name);
            std::fs::File::create(&path).unwrap().set_len(megabytes << 20).unwrap();
            exports.push((name.into(), FileExport::open(name, &path, false).unwrap()));
        }
        let exports = std::rc::Rc::new(Fixed(exports));
        let server = place.serve_all(exports, backtide_export::Limits::default()).await;
        let list = run("nbdinfo", &["--list", &place.uri("").to_string()]).await;
        for (name, size) in [("first", 1 << 20), ("second", 2 << 20), ("third", 3 << 20)] {
            for line in [
                format!("export=\"{name}\""),
                format!("description: the file {}", place.path(name).display()),
                format!("export-size: {size}"),
            ] {
                assert!(list.contains(&line), "{line:?} is not in {list}");
            }
        }
        for (name, size) in [("", "1048576"), ("first", "1048576"), ("third", "3145728")] {
            let shown = run("nbdinfo", &["--size", &place.uri(name).to_string()]).await;
            assert_eq!(shown.trim(), size, "export {name:?}");
        }
        server.shutdown(GRACE).await;
    });
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    on_a_worker(async {
        let place = Place::new();
        let (server, uri) = served(&place).await;
        let story = [
            "write -P 0x11 0 1M",
            "write -f -P 0x22 512 512",
            "write -z 64k 4k",
            "write -z -u 128k 4k",
            "discard 192k 64k",
            "aio_write -P 0x33 2M 32M",
            "aio_flush",
            "flush",
            "read -P 0x11 0 512",
            "read -P 0x22 512 512",
            "read -P 0 64k 4k",
            "read -P 0 128k 4k",
            "read -P 0 192k 64k",
            "read -P 0x11 256k 768k",
            "read -P 0x33 2M 32M",
            "read -P 0 34M 30M",
        ];
        let mut arguments = vec!["-f", "raw"];
        arguments.extend(story.iter().flat_map(|step| ["-c", step]));
        arguments.push(&uri);
        let printed = run("qemu-io", &arguments).await;
        assert!(!printed.contains("failed"), "{printed}");
        let beyond = ["-f", "raw", "-c", "write 64M 4k", &uri];
        assert!(!command("qemu-io").args(beyond).output().await.unwrap().status.success());
        server.shutdown(GRACE).await;
    });
}

#[test]
fn qemu_negotiates_extended_headers_and_zeroes_more_than_32_bits_at_once() {
    on_a_worker(async {
        let place = Place::new();
        let disk = FileExport::open("disk", &place.image(16 << 30), false).unwrap();
        let server = place.serve(disk).await;
        let uri = place.uri("disk").to_string();
        let trace = ["-T", "enable=nbd_*", "-f", "raw"];
        let steps = ["-c", "write -P 9 6G 1M", "-c", "write -z -u -n 1G 10G", "-c", "read -P 0 6G 1M", &uri];
        let output = command("qemu-io").args(trace).args(steps).output().await.unwrap();
        let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && !printed.contains("failed"), "{printed}");
        assert!(printed.contains("(extended headers), type 1 (ack)"), "{printed}");
        assert!(printed.contains(".from = 1073741824, .len = 10737418240"), "{printed}");
        server.shutdown(GRACE).await;
    });
}

#[test]
fn a_read_only_export_is_opened_only_for_reading() {
    on_a_worker(async {
        let place = Place::new();
        let disk = FileExport::open("disk", &place.image(SIZE), true).unwrap();
        let server = place.serve(disk).await;
        let uri = place.uri("disk").to_string();
        run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 1M", &uri]).await;
        let write = ["-f", "raw", "-c", "write 0 4k", &uri];
        assert!(!command("qemu-io").args(write).output().await.unwrap().status.success());
        server.shutdown(GRACE).await;
    });
}

#[test]
fn qemu_img_and_nbdcopy_copy_in_and_out_without_a_difference() {
    on_a_worker(async {
        let place = Place::new();
        let (server, uri) = served(&place).await;
        let (source, copy) = (place.path("source"), place.path("copy"));
        write_noise(&source, SIZE as usize);
        // Holes on both ends and in the middle.
        let file = std::fs::File::options().write(true).open(&source).unwrap();
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        for (at, length) in [(0, 1 << 20), (10 << 20, 5 << 20), (60 << 20, 4 << 20)] {
            rustix::fs::fallocate(&file, punch, at, length).unwrap();
        }
        let (from, to) = (source.to_str().unwrap(), copy.to_str().unwrap());
        run("nbdcopy", &[from, &uri]).await;
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", from, &uri]).await;
        run("nbdcopy", &["--connections=4", &uri, to]).await;
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(&source).unwrap());

        write_noise(&source, SIZE as usize / 2);
        file.set_len(SIZE).unwrap();
        run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", from, &uri]).await;
        run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, to]).await;
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(&source).unwrap());
        let map = run("nbdinfo", &["--map", &uri]).await;
        assert!(map.contains("hole,zero"), "{map}");
        server.shutdown(GRACE).await;
    });
}

#[test]
fn fio_verifies_what_it_wrote_over_several_connections() {
    on_a_worker(async {
        let place = Place::new();
        let (server, uri) = served(&place).await;
        let uri = format!("--uri={uri}");
        let arguments = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randrw",
            "--bsrange=512-128k",
            "--size=16M",
            "--iodepth=32",
            "--verify=crc32c",
            "--do_verify=1",
            "--numjobs=3",
            "--offset_increment=16M",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--output=/dev/null",
            "--fsync=64",
        ];
        run("fio", &arguments).await;
        server.shutdown(GRACE).await;
    });
}

#[test]
fn tcp_serves_the_same() {
    on_a_worker(async {
        let place = Place::new();
        let disk = FileExport::open("disk", &place.image(SIZE), false).unwrap();
        let address = NbdAddress::Tcp { host: "127.0.0.1".into(), port: 0 };
        let listener = backtide_export::Listener::bind(&address).await.unwrap();
        let server = listener.serve(Fixed::one(disk), backtide_export::Limits::default());
        let address = server.address().clone();
        let uri = backtide_export::NbdUri { address, export: "disk".into(), tls: None }.to_string();
        let steps = ["-f", "raw", "-c", "write -P 5 1M 8M", "-c", "read -P 5 1M 8M", &uri];
        run("qemu-io", &steps).await;
        server.shutdown(GRACE).await;
    });
}

#[test]
fn zeroes_that_are_told_and_not_sent_are_read_as_zeroes() {
    on_a_worker(async {
        let place = Place::new();
        let (server, uri) = served(&place).await;
        let image = place.path("disk.img");
        // Stretches of data and zeroes that begin and end anywhere, the last byte of all among the data.
        let mut bytes = vec![0; SIZE as usize];
        for (number, at) in (0..bytes.len()).step_by(777_777).enumerate() {
            let end = (at + (number % 5) * 100_001).min(bytes.len());
            bytes[at..end].fill(number as u8 | 1);
        }
        *bytes.last_mut().unwrap() = 7;
        std::fs::write(&image, &bytes).unwrap();
        let copy = place.path("copy");
        for size in ["--request-size=4096", "--request-size=262144", "--request-size=33554432"] {
            // Everything is read, whatever block status would say of it.
            run("nbdcopy", &["--no-extents", size, &uri, copy.to_str().unwrap()]).await;
            assert!(std::fs::read(&copy).unwrap() == bytes, "{size}");
        }
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, image.to_str().unwrap()]).await;
        run("qemu-io", &["-f", "raw", &uri, "-c", "read -P 0 400k 300k", "-c", "read -v 760k 8k"]).await;
        let client = backtide_export::Client::connect(&place.uri("disk")).await.unwrap();
        for (at, length) in [(0, 4 << 20), (700_000, 200_000), (777_777, 1), (1 << 20, 32 << 20)] {
            let read =
                client.read(backtide_units::ByteOffset(at), backtide_units::ByteCount(length)).await.unwrap();
            assert!(read == bytes[at as usize..][..length as usize], "{length} bytes at {at}");
        }
        drop(client);
        server.shutdown(GRACE).await;
    });
}
