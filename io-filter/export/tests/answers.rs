//! What the client takes for an answer, from servers written by hand; and how much it asks for.

mod support;

use backtide_export::{Client, ClientError, Extent, NbdUri};
use backtide_nbd::{Command, wire};
use backtide_units::{ByteCount, ByteOffset};
use support::{GRACE, Manual, Place, on_a_worker};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener},
};
use wire::{chunk, option as code, option_reply as reply};

/// The size of the disk that is served by hand.
const SIZE: u64 = 1 << 20;

async fn answer_option(stream: &mut (impl AsyncWrite + Unpin), code: u32, reply: u32, data: &[u8]) {
    let mut bytes = wire::magic::OPTION_REPLY.to_be_bytes().to_vec();
    for word in [code, reply, data.len() as u32] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes.extend_from_slice(data);
    stream.write_all(&bytes).await.unwrap();
}

/// Shakes hands as a server of structured replies.
async fn shake_hands(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03").await.unwrap();
    stream.read_exact(&mut [0; 4]).await.unwrap();
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header).await.unwrap();
        let code = u32::from_be_bytes(header[8..12].try_into().unwrap());
        let mut data = vec![0; u32::from_be_bytes(header[12..].try_into().unwrap()) as usize];
        stream.read_exact(&mut data).await.unwrap();
        match code {
            code::EXTENDED_HEADERS => answer_option(stream, code, reply::ERR_UNSUP, &[]).await,
            code::SET_META_CONTEXT => {
                let context = [&[0, 0, 0, 1][..], b"base:allocation"].concat();
                answer_option(stream, code, reply::META_CONTEXT, &context).await;
                answer_option(stream, code, reply::ACK, &[]).await;
            }
            code::GO => {
                let export = [&[0, 0][..], &SIZE.to_be_bytes(), &[0, 1]].concat();
                answer_option(stream, code, reply::INFO, &export).await;
                answer_option(stream, code, reply::ACK, &[]).await;
                break;
            }
            _ => answer_option(stream, code, reply::ACK, &[]).await,
        }
    }
}

/// Shakes hands, and answers the first request with these chunks: kind and payload.
async fn serve_by_hand(listener: UnixListener, chunks: &[(u16, Vec<u8>)]) {
    let (mut stream, _) = listener.accept().await.unwrap();
    shake_hands(&mut stream).await;
    let mut request = [0; 28];
    stream.read_exact(&mut request).await.unwrap();
    for (number, (kind, payload)) in chunks.iter().enumerate() {
        let last = number + 1 == chunks.len();
        let mut bytes = wire::magic::STRUCTURED_REPLY.to_be_bytes().to_vec();
        bytes.extend_from_slice(&(if last { chunk::FLAG_DONE } else { 0 }).to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&request[8..16]);
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
        // The client may have hung up over an earlier one.
        let _ = stream.write_all(&bytes).await;
    }
    // Until the client hangs up or says good-bye; one that asks for more gets nothing.
    let _ = stream.read(&mut [0; 28]).await;
}

fn data(offset: u64, length: usize) -> (u16, Vec<u8>) {
    (chunk::OFFSET_DATA, [&offset.to_be_bytes()[..], &vec![7; length]].concat())
}

fn hole(offset: u64, length: u32) -> (u16, Vec<u8>) {
    (chunk::OFFSET_HOLE, [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat())
}

fn data_extent(length: u32) -> (u16, Vec<u8>) {
    (chunk::BLOCK_STATUS, [1, length, 0].map(u32::to_be_bytes).concat())
}

/// What a client makes of this answer to its request, and whether its connection is over then.
fn asked<T>(
    chunks: &[(u16, Vec<u8>)],
    ask: impl AsyncFnOnce(&Client) -> Result<T, ClientError>,
) -> (Result<T, ClientError>, bool) {
    on_a_worker(async {
        let place = Place::new();
        let listener = UnixListener::bind(place.path("socket")).unwrap();
        let (_, outcome) = tokio::join!(serve_by_hand(listener, chunks), async {
            let client = Client::connect(&place.uri("")).await.unwrap();
            let result = ask(&client).await;
            (result, client.lost().is_some())
        });
        outcome
    })
}

fn read(chunks: &[(u16, Vec<u8>)]) -> (Result<Vec<u8>, ClientError>, bool) {
    asked(chunks, async |client| client.read(ByteOffset(512), ByteCount(1024)).await.map(Vec::from))
}

#[test]
fn a_read_takes_its_pieces_in_any_order_once_each() {
    for chunks in [
        vec![data(512, 1024)],
        vec![data(512, 512), data(1024, 512)],
        vec![data(1024, 512), data(512, 512)],
        vec![data(700, 100), data(800, 736), data(512, 188)],
    ] {
        let (result, lost) = read(&chunks);
        assert_eq!((result.unwrap(), lost), (vec![7; 1024], false));
    }
    let (result, _) = read(&[data(1024, 512), hole(512, 512)]);
    assert_eq!(result.unwrap(), [[0; 512], [7; 512]].concat());
}

#[test]
fn a_read_with_bytes_that_come_twice_or_never_ends_the_connection() {
    for chunks in [
        // The sum is right, and the second half is nowhere.
        vec![data(512, 512), data(512, 512)],
        vec![data(512, 512), hole(512, 512)],
        vec![hole(512, 1024), hole(512, 512)],
        vec![data(512, 768), data(1024, 256)],
        vec![data(768, 256), data(512, 768)],
        vec![data(512, 1024), data(512, 1)],
        vec![data(512, 512), data(1025, 511)],
        vec![data(512, 512), (chunk::NONE, vec![])],
    ] {
        let (result, lost) = read(&chunks);
        let lengths: Vec<usize> = chunks.iter().map(|(_, payload)| payload.len()).collect();
        assert!(matches!(result, Err(ClientError::Protocol(_))) && lost, "{lengths:?}: {result:?}");
    }
}

#[test]
fn block_status_that_goes_on_in_a_second_chunk_ends_the_connection() {
    let ask = async |client: &Client| client.block_status(ByteOffset(0), ByteCount(SIZE)).await;
    let (whole, lost) = asked(&[data_extent(SIZE as u32)], ask);
    assert_eq!((whole.unwrap(), lost), (vec![Extent::data(ByteCount(SIZE))], false));
    let (twice, lost) = asked(&[data_extent(SIZE as u32 / 2), data_extent(SIZE as u32 / 2)], ask);
    assert!(matches!(twice, Err(ClientError::Protocol(_))) && lost, "{twice:?}");
}

/// Extents of 64 KiB, of data and holes in turn, from the beginning of a request on.
fn stripes(command: &Command) -> Vec<Extent> {
    let Command::BlockStatus { one, .. } = command else { panic!("{command:?}") };
    let start = command.range().start().0;
    assert_eq!(start % (64 << 10), 0);
    (start >> 16..)
        .take(if *one { 1 } else { 8 })
        .map(|number| if number % 2 == 0 { Extent::data } else { Extent::hole }(ByteCount(64 << 10)))
        .collect()
}

#[test]
fn the_beginning_of_block_status_costs_one_request_however_much_is_asked_for() {
    on_a_worker(async {
        let (place, disk) = (Place::new(), Manual::new("disk"));
        let server = place.serve(disk.clone()).await;
        let client = Client::connect(&place.uri("")).await.unwrap();
        for (max, found, asked_for_one) in [(1, 1, true), (5, 5, false), (100, 8, false)] {
            let before = disk.submitted();
            let answer = async {
                disk.until_waiting(1).await;
                let (command, reply) = disk.take();
                assert!(matches!(command, Command::BlockStatus { one, .. } if one == asked_for_one));
                reply.extents(&stripes(&command));
            };
            let (status, ()) =
                tokio::join!(client.first_block_status(ByteOffset(0), ByteCount(1 << 30), max), answer);
            let status = status.unwrap();
            assert_eq!((status.len(), disk.submitted() - before), (found, 1));
            assert!(status.iter().all(|extent| extent.length.0 == 64 << 10));
        }
        drop(client);
        server.shutdown(GRACE).await;
    });
}

/// A client, and a server over TCP that reads nothing.
async fn over_tcp() -> (Client, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri: NbdUri = format!("nbd://{}", listener.local_addr().unwrap()).parse().unwrap();
    let serving = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        shake_hands(&mut stream).await;
        stream
    };
    let (client, server) = tokio::join!(Client::connect(&uri), serving);
    (client.unwrap(), server)
}

/// The kernel sent it for minutes: over what had been written on another connection by then.
#[test]
fn what_a_server_has_not_got_when_it_is_given_up_never_gets_there() {
    on_a_worker(async {
        let (client, mut server) = over_tcp().await;
        let megabyte = bytes::Bytes::from(vec![7; SIZE as usize]);
        let writes: Vec<_> = (0..16)
            .map(|_| {
                let (client, data) = (client.clone(), megabyte.clone());
                tokio::spawn(async move { client.write(ByteOffset(0), data, false).await })
            })
            .collect();
        // The sockets are full of them.
        server.read_exact(&mut [0; 28]).await.unwrap();
        client.give_up();
        for write in writes {
            let error = write.await.unwrap().unwrap_err();
            assert!(error.is_lost(), "{error:?}");
        }
        assert!(client.lost().is_some());
        let ended = tokio::io::copy(&mut server, &mut tokio::io::sink()).await;
        assert_eq!(ended.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "it had not got all");
    });
}

#[test]
fn a_server_that_is_left_in_good_order_gets_the_good_bye() {
    on_a_worker(async {
        let (client, mut server) = over_tcp().await;
        drop(client);
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.expect("an end, and no reset");
        assert_eq!((rest.len(), &rest[4..8]), (28, &[0, 0, 0, 2][..]), "a request to disconnect");
    });
}
