//! A client of QMP of the tests' own.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use serde_json::{Value, json};

/// Connects to the monitor of a machine, gives these commands, and gives their answers.
pub fn qmp(socket: &Path, commands: &[Value]) -> Vec<Value> {
    let stream = UnixStream::connect(socket).expect("connect to QMP");
    let mut lines = BufReader::new(stream.try_clone().expect("a second handle")).lines();
    let mut line = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).expect("JSON of QMP");
    assert!(line()["QMP"].is_object());
    let capabilities = json!({ "execute": "qmp_capabilities" });
    let answers = std::iter::once(&capabilities).chain(commands).map(|command| {
        writeln!(&stream, "{command}").expect("ask QMP");
        loop {
            let answer = line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    });
    answers.skip(1).collect()
}
