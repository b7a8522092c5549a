//! A write that a client wants on stable storage is there before it is answered, whatever the image lies on.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use backtide_e2e::{Bench, FuseFile, Heard, skip};

const SIZE: usize = 1 << 20;

/// A client that writes one block with FUA, and waits for the answer; nothing else makes anything stable.
fn write_stable(socket: &str, export: &str, offset: u64) {
    let mut stream = UnixStream::connect(socket).expect("connect");
    let mut hello = [&3_u32.to_be_bytes()[..], b"IHAVEOPT\0\0\0\x01"].concat();
    hello.extend(u32::try_from(export.len()).expect("short").to_be_bytes());
    hello.extend(export.as_bytes());
    stream.write_all(&hello).expect("send");
    stream.read_exact(&mut [0; 28]).expect("an export");
    let mut request = b"\x25\x60\x95\x13\0\x01\0\x01\0\0\0\0\0\0\0\x07".to_vec();
    request.extend(offset.to_be_bytes());
    request.extend(4096_u32.to_be_bytes());
    request.resize(request.len() + 4096, 7);
    stream.write_all(&request).expect("send");
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).expect("an answer");
    assert_eq!(reply, *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x07");
}

#[test]
fn a_stable_write_to_a_file_of_fuse_is_synced_though_the_kernel_does_not() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    for (number, cache) in ["writeback", "direct"].into_iter().enumerate() {
        let image = format!("fuse{number}.img");
        let file = match FuseFile::start(&bench, &image, SIZE) {
            Ok(file) => file,
            Err(why) => return skip(&why),
        };
        for engine in ["auto", "threads"] {
            let agent = bench.daemon(&["agent", "run", "--io-engine", engine]);
            let name = format!("vm{number}");
            let disk = match engine {
                "auto" => bench.attach(&name, &image, &["--cache", cache]),
                _ => bench.disk(&name),
            };
            disk.settle();
            let socket = bench.name(&format!("{name}.nbd"));
            // The first change of an extent waits for the activity log; both ways are looked at.
            for offset in [0, 8192] {
                file.heard();
                write_stable(&socket, &name, offset);
                let heard = file.heard();
                assert_eq!(heard, [Heard::Write(offset), Heard::Sync], "{cache}, {engine}");
            }
            if engine == "threads" {
                disk.settle();
                bench.json(&["detach", &name]);
            }
            assert_eq!(agent.stop(), 0);
        }
    }
}
