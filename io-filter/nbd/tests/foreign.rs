//! The `nbd` crate, which nobody here wrote, as client and as server of our machines.

mod support;

use std::{
    io::{BufReader, Cursor, Read, Seek, SeekFrom, Write},
    os::unix::net::UnixStream,
    thread,
};

use backtide_nbd::client::{
    Content, Expected, Goal, Handshake, ReplyParser, Session, Step, encode_disconnect, encode_request,
};
use backtide_nbd::{Command, Cookie, Intake, ReplyStyle};
use backtide_units::{ByteCount, ByteOffset};
use bytes::{Bytes, BytesMut};
use support::{SIZE, read_some, serve};

#[test]
fn the_foreign_client_reads_what_it_wrote_to_our_server() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let mut disk = vec![0; SIZE as usize];
        serve(ours, &mut disk).unwrap();
        disk
    });
    let export = nbd::client::handshake(&mut theirs, b"disk").unwrap();
    assert_eq!((export.size, export.readonly, export.send_flush), (SIZE, false, true));
    let mut client = nbd::client::NbdClient::new(&mut theirs, &export);
    let data: Vec<u8> = (0..200_000_u32).map(|at| (at / 7) as u8).collect();
    client.seek(SeekFrom::Start(4096)).unwrap();
    client.write_all(&data).unwrap();
    client.flush().unwrap();
    client.seek(SeekFrom::Start(4096)).unwrap();
    let mut read = vec![0; data.len()];
    client.read_exact(&mut read).unwrap();
    assert!(read == data);
    // Beyond the end: an error of ours, and the connection goes on.
    client.seek(SeekFrom::Start(SIZE - 100)).unwrap();
    assert!(client.read_exact(&mut [0; 200]).is_err());
    drop(theirs);
    let disk = server.join().unwrap();
    assert!(disk[4096..4096 + data.len()] == data);
}

/// Our client's machines over a blocking stream.
struct Client {
    stream: UnixStream,
    intake: Intake,
    parser: ReplyParser,
    style: ReplyStyle,
    next: u64,
}

impl Client {
    fn open(mut stream: UnixStream, name: &str) -> (Self, Session) {
        let (mut intake, mut out) = (Intake::new(), BytesMut::new());
        let mut machine = Handshake::new(Goal::Open(name.into()));
        loop {
            let step = machine.step(&mut intake, &mut out).unwrap();
            stream.write_all(&out.split()).unwrap();
            match step {
                Step::NeedMore => assert!(read_some(&mut stream, &mut intake)),
                Step::Transmission(session) => {
                    let parser = ReplyParser::new(&session);
                    let style = session.style;
                    return (Self { stream, intake, parser, style, next: 0 }, session);
                }
                Step::StartTls => panic!("no TLS was asked for"),
                Step::Listed(_) => panic!("no list was asked for"),
            }
        }
    }

    /// Does one request; what it brought.
    fn ask(&mut self, command: &Command) -> Vec<Content> {
        self.next += 1;
        let cookie = Cookie(self.next);
        let mut out = BytesMut::new();
        encode_request(&mut out, self.style, cookie, command);
        if let Command::Write { data, .. } = command {
            out.extend_from_slice(data);
        }
        self.stream.write_all(&out).unwrap();
        let expected = Expected::by(command);
        let mut contents = Vec::new();
        loop {
            let known = |found: Cookie| (found == cookie).then_some(expected);
            match self.parser.next(&mut self.intake, known).unwrap() {
                Some(reply) => {
                    contents.push(reply.content);
                    if reply.last {
                        return contents;
                    }
                }
                None => assert!(read_some(&mut self.stream, &mut self.intake)),
            }
        }
    }

    fn leave(mut self) {
        let mut out = BytesMut::new();
        encode_disconnect(&mut out, self.style);
        self.stream.write_all(&out).unwrap();
    }
}

fn write_and_read_back(client: &mut Client) {
    let data = Bytes::from((0..150_000_u32).map(|at| (at / 3) as u8).collect::<Vec<_>>());
    let (offset, length) = (ByteOffset(8192), ByteCount::of(&data));
    let write = Command::Write { offset, data: data.clone(), fua: false };
    assert_eq!(client.ask(&write), [Content::Nothing]);
    assert_eq!(client.ask(&Command::Flush), [Content::Nothing]);
    let read = Command::Read { offset, length, one_chunk: false };
    assert_eq!(client.ask(&read), [Content::Data { offset, data }]);
}

#[test]
fn our_client_falls_back_to_what_the_foreign_server_knows() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        // Its reads are of single numbers: without a buffer it would take forever.
        let mut stream = Buffered(BufReader::new(theirs));
        let disk = Cursor::new(vec![0; SIZE as usize]);
        let export = |_: &str| Ok(nbd::Export { size: SIZE, data: disk, ..Default::default() });
        let disk = nbd::server::handshake(&mut stream, export).unwrap();
        nbd::server::transmission(&mut stream, disk)
    });
    let (mut client, session) = Client::open(ours, "rustnbd");
    assert_eq!((session.size, session.style), (ByteCount(SIZE), ReplyStyle::Simple));
    assert_eq!(session.base_allocation, None);
    write_and_read_back(&mut client);
    client.leave();
    server.join().unwrap().unwrap();
}

#[test]
fn our_client_and_our_server_agree_on_everything() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || serve(theirs, &mut vec![1; SIZE as usize]));
    let (mut client, session) = Client::open(ours, "coarse");
    assert_eq!((session.size, session.style), (ByteCount(SIZE), ReplyStyle::Extended));
    assert_eq!(session.base_allocation, Some(1));
    assert_eq!(session.block_sizes.minimum, 4096);
    let (offset, length) = (ByteOffset(0), ByteCount(8192));
    let zero = Command::WriteZeroes { offset, length, fua: true, no_hole: true, fast: false };
    assert_eq!(client.ask(&zero), [Content::Nothing]);
    let read = Command::Read { offset, length: ByteCount(4096), one_chunk: true };
    let data = Bytes::from(vec![0; 4096]);
    assert_eq!(client.ask(&read), [Content::Data { offset, data }]);
    let status = Command::BlockStatus { offset, length, one: false };
    let half = ByteCount(4096);
    let extents = vec![backtide_nbd::Extent::hole(half), backtide_nbd::Extent::data(half)];
    assert_eq!(client.ask(&status), [Content::Extents(extents)]);
    let beyond = Command::Read { offset: ByteOffset(SIZE), length, one_chunk: false };
    let error = backtide_nbd::NbdError::Invalid;
    assert_eq!(
        client.ask(&beyond),
        [Content::Error { error, text: "the range reaches beyond the end of the export".into() }]
    );
    client.leave();
    server.join().unwrap().unwrap();
}

struct Buffered(BufReader<UnixStream>);

impl Read for Buffered {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Buffered {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.get_mut().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
