//! Calls of a control API by hand: for askers that go away, which the command does not.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use serde_json::Value;

/// Sends a request to the API at `socket` and does not wait for its answer. The asker is gone when the
/// stream is dropped.
pub fn ask(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("connect to a control API");
    let body = body.map(Value::to_string).unwrap_or_default();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).expect("send a request");
    stream
}

/// Makes a call that must succeed; its answer.
pub fn call(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Value {
    let mut text = String::new();
    ask(socket, method, path, body).read_to_string(&mut text).expect("read an answer");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {text:?}"));
    assert!(head.starts_with("HTTP/1.1 200"), "{method} {path}: {text}");
    serde_json::from_str(body).unwrap_or_else(|error| panic!("no JSON: {error}: {text}"))
}
