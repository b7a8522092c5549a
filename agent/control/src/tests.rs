//! A real daemon end and a real client end, over real sockets.

use std::{
    future::pending,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Json, Router, routing::post};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{Address, ApiError, ApiJson, BindError, Client, ErrorCode, Peer, Server, Tell};

const PEER: Peer =
    Peer { name: "agent", start: "backtide agent run", flag: "--agent", variable: "BACKTIDE_AGENT" };

#[derive(Debug, Serialize, Deserialize)]
struct Number {
    n: u32,
}

async fn double(ApiJson(number): ApiJson<Number>) -> Result<Json<Number>, ApiError> {
    if number.n > 100 {
        return Err(ApiError::new(ErrorCode::Refused, "too large").with_hint("at most 100"));
    }
    Ok(Json(Number { n: number.n * 2 }))
}

fn router() -> Router {
    Router::new().route("/double", post(double))
}

fn socket_in(directory: &Path) -> Address {
    Address::unix(directory.join("api.sock"))
}

async fn ask(address: &Address, n: u32) -> Result<u32, ApiError> {
    let client = Client::new(address, PEER).unwrap();
    client.post::<_, Number>("/double", &Number { n }).await.map(|number| number.n)
}

async fn check_calls(address: &Address) {
    let server = Server::bind(address).await.unwrap();
    let address = server.address().clone();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server.run(router(), async move {
        stopped.await.unwrap();
    }));

    assert_eq!(ask(&address, 21).await.unwrap(), 42);
    let refused = ask(&address, 101).await.unwrap_err();
    assert_eq!(refused, ApiError::new(ErrorCode::Refused, "too large").with_hint("at most 100"));

    let client = Client::new(&address, PEER).unwrap();
    let unknown = client.get::<_, Number>("/triple", &()).await.unwrap_err();
    assert_eq!(
        (unknown.code, unknown.message.as_str()),
        (ErrorCode::NotFound, "there is no call GET /triple")
    );
    let wrong_method = client.get::<_, Number>("/double", &()).await.unwrap_err();
    assert_eq!(wrong_method.message, "there is no call GET /double");
    let wrong_body = client.post::<_, Number>("/double", &["x"]).await.unwrap_err();
    assert_eq!(wrong_body.code, ErrorCode::Usage);
    let huge = client.post::<_, Number>("/double", &"x".repeat(2 << 20)).await.unwrap_err();
    assert_eq!(huge.code, ErrorCode::Usage);
    assert!(huge.message.contains("more than 1048576 bytes"), "{huge}");

    stop.send(()).unwrap();
    serving.await.unwrap().unwrap();
    let gone = ask(&address, 1).await.unwrap_err();
    assert_eq!(gone.code, ErrorCode::Unreachable);
    assert!(gone.message.contains(&format!("no agent answers at {address}")), "{gone}");
    assert!(gone.hint.unwrap().contains("backtide agent run"), "the hint says how to start it");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_and_errors_travel_over_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    check_calls(&socket_in(directory.path())).await;
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_and_errors_travel_over_loopback() {
    check_calls(&"tcp://127.0.0.1:0".parse().unwrap()).await;
    check_calls(&"tcp://localhost:0".parse().unwrap()).await;
}

#[tokio::test]
async fn only_the_owner_may_connect_to_the_socket() {
    let directory = tempfile::tempdir().unwrap();
    let _server = Server::bind(&socket_in(directory.path())).await.unwrap();
    let mode = std::fs::metadata(directory.path().join("api.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_live_socket_is_in_use_and_a_stale_one_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let address = socket_in(directory.path());
    let first = Server::bind(&address).await.unwrap();
    let error = Server::bind(&address).await.unwrap_err();
    assert!(matches!(error, BindError::InUse { .. }), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    drop(first);

    // What `kill -9` leaves: a socket file that nobody listens on.
    let stale = directory.path().join("api.sock");
    drop(UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    Server::bind(&address).await.unwrap();
}

#[tokio::test]
async fn a_file_in_the_sockets_place_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("api.sock"), "precious").unwrap();
    let error = Server::bind(&socket_in(directory.path())).await.unwrap_err();
    assert!(matches!(error, BindError::NoSocket { .. }), "{error}");
    assert_eq!(std::fs::read(directory.path().join("api.sock")).unwrap(), b"precious");
}

#[tokio::test]
async fn a_network_address_is_refused_for_control() {
    let error = Server::bind(&"tcp://0.0.0.0:0".parse().unwrap()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Refused);
    assert!(error.to_string().contains("loopback only"), "{error}");
}

/// What a request with these headers is answered on loopback, as curl and browsers send it.
async fn asked_with(headers: &[(&'static str, &str)]) -> (u16, String) {
    let server = Server::bind(&"tcp://127.0.0.1:0".parse().unwrap()).await.unwrap();
    let Address::Tcp { port, .. } = *server.address() else { unreachable!("bound to TCP") };
    let serving = tokio::spawn(server.run(router(), pending()));
    let mut request =
        reqwest::Client::new().post(format!("http://127.0.0.1:{port}/double")).json(&Number { n: 1 });
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = request.send().await.unwrap();
    let answer = (answer.status().as_u16(), answer.text().await.unwrap());
    serving.abort();
    answer
}

#[tokio::test]
async fn a_foreign_host_name_on_loopback_is_refused() {
    for foreign in [
        "evil.example",
        "evil.example:80",
        "127.evil.example",
        "127.0.0.1.evil.example:8080",
        "localhost.evil.example",
        "localhost:80.evil.example",
        "192.0.2.1",
        "[::2]:80",
        "[::1].evil.example",
        "::1",
        "",
    ] {
        assert_eq!(asked_with(&[("host", foreign)]).await.0, 403, "{foreign:?}");
    }
    for own in ["localhost", "localhost:80", "127.0.0.1", "127.8.9.1:80", "[::1]", "[::1]:80"] {
        assert_eq!(asked_with(&[("host", own)]).await, (200, r#"{"n":2}"#.to_owned()), "{own:?}");
    }
}

#[tokio::test]
async fn a_web_page_is_refused_whatever_it_asks_for() {
    for page in ["http://evil.example", "http://127.0.0.1", "null"] {
        let (status, told) = asked_with(&[("origin", page)]).await;
        assert_eq!(status, 403, "{page:?}");
        assert!(told.contains(r#""code":"refused""#) && told.contains("Origin"), "{told}");
    }
    assert_eq!(asked_with(&[]).await.0, 200);
    // A port that is forwarded to the socket is in a browser's reach as well.
    let directory = tempfile::tempdir().unwrap();
    let address = socket_in(directory.path());
    let server = Server::bind(&address).await.unwrap();
    tokio::spawn(server.run(router(), pending()));
    let mut client = idle(&address).await;
    let call = b"POST /double HTTP/1.1\r\nhost: x\r\norigin: http://x\r\nconnection: close\r\n\r\n";
    client.write_all(call).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
}

#[tokio::test]
async fn a_missing_directory_is_named() {
    let error = Server::bind(&Address::unix("/nonexistent/deep/api.sock")).await.unwrap_err();
    let sentence = ApiError::from_error(error.code(), &error).message;
    assert!(sentence.starts_with("listen at unix:/nonexistent/deep/api.sock: "), "{sentence}");
}

/// The clock stands still while anything but time can go on, so nothing here takes long.
#[tokio::test(start_paused = true)]
async fn a_daemon_that_says_nothing_is_waited_for_as_long_as_the_call_is_worth() {
    let directory = tempfile::tempdir().unwrap();
    // It takes connections, as the kernel does for a process that is stopped.
    let _silent = UnixListener::bind(directory.path().join("api.sock")).unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&told);
    let tell = Tell::new(move |text| hears.lock().unwrap().push(text.to_owned()));
    let address = socket_in(directory.path());
    let client = Client::new(&address, PEER).unwrap().telling(tell);

    let begun = tokio::time::Instant::now();
    let error = client.get::<_, Number>("/double", &()).await.unwrap_err();
    assert_eq!(begun.elapsed().as_secs(), 15);
    assert!(error.is_silence() && error.code == ErrorCode::Unreachable, "{error:?}");
    assert!(
        error.message.starts_with(&format!("the agent at {address} has not answered for 15 s")),
        "{error}"
    );
    assert_eq!(told.lock().unwrap().len(), 0);

    let begun = tokio::time::Instant::now();
    let error = client.at_length().get::<_, Number>("/double", &()).await.unwrap_err();
    assert!(begun.elapsed() >= Duration::from_secs(60), "{:?}", begun.elapsed());
    assert!(error.is_silence(), "{error:?}");
    let told = told.lock().unwrap();
    let expected = format!("the agent at {address} has not answered for 10 s, still waiting");
    assert_eq!(*told, [expected]);
}

/// A connection on which nothing was asked.
async fn idle(address: &Address) -> tokio::net::UnixStream {
    tokio::net::UnixStream::connect(address.socket_path().unwrap()).await.unwrap()
}

/// A connection on which something was asked and answered, and nothing since.
async fn answered(address: &Address) -> tokio::net::UnixStream {
    let mut client = idle(address).await;
    client.write_all(b"GET /nothing HTTP/1.1\r\nhost: here\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"}") {
        client.read_buf(&mut answer).await.unwrap();
    }
    client
}

/// Waits until the server ends it.
async fn ended(mut stream: tokio::net::UnixStream) {
    let mut nothing = [0];
    assert_eq!(tokio::io::AsyncReadExt::read(&mut stream, &mut nothing).await.unwrap(), 0);
}

#[tokio::test]
async fn clients_that_ask_for_nothing_end_when_there_are_too_many_and_calls_do_not() {
    let directory = tempfile::tempdir().unwrap();
    let address = socket_in(directory.path());
    let server = Server::bind(&address).await.unwrap();
    let (come, mut came) = tokio::sync::mpsc::channel(1);
    let go = Arc::new(tokio::sync::Notify::new());
    let gone = Arc::clone(&go);
    let slow = move || async move {
        come.send(()).await.unwrap();
        gone.notified().await;
        Json(Number { n: 7 })
    };
    let router = router().route("/slow", axum::routing::get(slow));
    tokio::spawn(server.run(router, pending()));
    let client = Client::new(&address, PEER).unwrap();
    let call = tokio::spawn(async move { client.get::<_, Number>("/slow", &()).await });
    came.recv().await.unwrap();
    let (first, second) = (answered(&address).await, idle(&address).await);
    // One more than there may be: the one that has to go is not the call's, which is the oldest.
    let mut others = Vec::new();
    for _ in 0..crate::lines::LINES_MAX - 2 {
        others.push(idle(&address).await);
    }
    ended(first).await;
    others.push(idle(&address).await);
    ended(second).await;
    assert_eq!(ask(&address, 21).await.unwrap(), 42);
    go.notify_one();
    assert_eq!(call.await.unwrap().unwrap().n, 7, "its call was under way");
}

/// How much is to be had at `/long`: more than a socket holds.
const LONG: usize = 8 << 20;

/// A client that has begun to take a long answer.
async fn begun_to_take(directory: &Path) -> (Address, tokio::net::UnixStream) {
    let address = socket_in(directory);
    let server = Server::bind(&address).await.unwrap();
    let router = router().route("/long", axum::routing::get(|| async { vec![7; LONG] }));
    tokio::spawn(server.run(router, pending()));
    let mut client = idle(&address).await;
    let call = b"GET /long HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n";
    client.write_all(call).await.unwrap();
    client.read_exact(&mut [0; 1024]).await.unwrap();
    (address, client)
}

/// How much more comes until the server ends it.
async fn rest(mut client: tokio::net::UnixStream) -> usize {
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.unwrap()
}

#[tokio::test]
async fn who_still_takes_an_answer_gives_way_to_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let (address, client) = begun_to_take(directory.path()).await;
    let mut others = Vec::new();
    for _ in 0..crate::lines::LINES_MAX {
        others.push(idle(&address).await);
    }
    assert_eq!(ask(&address, 21).await.unwrap(), 42, "behind them all");
    assert!(rest(client).await > LONG - 1024);
    ended(others.swap_remove(0)).await;
}

#[tokio::test]
async fn who_takes_nothing_of_an_answer_for_long_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let (address, client) = begun_to_take(directory.path()).await;
    assert_eq!(ask(&address, 21).await.unwrap(), 42);
    tokio::time::pause();
    tokio::time::sleep(std::time::Duration::from_secs(61)).await;
    assert!(rest(client).await < LONG - 1024);
}

#[tokio::test]
async fn a_client_that_asks_for_nothing_for_long_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let address = socket_in(directory.path());
    let server = Server::bind(&address).await.unwrap();
    tokio::spawn(server.run(router(), pending()));
    let silent = idle(&address).await;
    assert_eq!(ask(&address, 21).await.unwrap(), 42);
    // From here on the clock is at the next event at once.
    tokio::time::pause();
    ended(silent).await;
}
