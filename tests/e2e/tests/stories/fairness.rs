//! 64 disks of one agent, among them one on a device that is dead, some with a greedy guest, and one with a
//! guest that is deaf: the others get on as if they were alone, each as much as any other. What is compared
//! is how many of their requests were answered, never how long that took.

use backtide_e2e::{
    Bench, LoggedDisk, http,
    nbd_wire::{Connection, wait_for_answers},
};
use serde_json::{Value, json};

const SIZE: u64 = 16 << 20;

const DISKS: usize = 64;

/// Disks whose guests have many long requests under way; the others have a short one.
const GREEDY: usize = 3;

/// Requests that a greedy guest has under way.
const DEPTH: usize = 16;

/// The slowest modest disk gets so many answers in each round.
const ANSWERS: u64 = 50;

/// No modest disk has more than so many times the answers of any other, beside [`ALLOWANCE`]. On a host with other work
/// the scheduler alone gives one thread three times what it gives another; a disk that is held up has none.
const FACTOR: u64 = 8;

/// What a disk may have before another has any: as much as a thread does before the scheduler takes its turn away.
const ALLOWANCE: u64 = 50;

/// A guest that sends the next request when one was answered.
struct Guest {
    connection: Connection,
    length: usize,
    sent: u64,
    answered: u64,
}

impl Guest {
    fn begin(uri: &str, length: usize, depth: usize) -> Self {
        let mut guest = Self { connection: Connection::open(uri), length, sent: 0, answered: 0 };
        (0..depth).for_each(|_| guest.send());
        guest
    }

    fn send(&mut self) {
        let offset = self.sent * self.length as u64 % SIZE;
        let data = vec![self.sent as u8; self.length];
        self.connection.send_write(offset, &data, false).expect("a disk that is served");
        self.sent += 1;
    }

    fn go_on(&mut self) {
        let answers = self.connection.answers_there();
        self.answered += answers as u64;
        (0..answers).for_each(|_| self.send());
    }
}

/// Every guest goes on until each modest one has so many answers more; then they are compared.
fn round(guests: &mut [Guest], what: &str) {
    for guest in guests.iter_mut() {
        guest.answered = 0;
    }
    go_on_until(guests, |guests| {
        let (counts, least, most) = of_the_modest(guests);
        assert!(
            most <= FACTOR * least + ALLOWANCE,
            "{what}: a disk has {least} answers, another {most}: {counts:?}"
        );
        least >= ANSWERS
    });
    let (_, least, most) = of_the_modest(guests);
    let greedy: Vec<u64> = guests[..GREEDY].iter().map(|one| one.answered).collect();
    println!("{what}: from {least} to {most} answers a disk, the greedy ones {greedy:?}");
}

/// The answers of each modest guest, the fewest and the most.
fn of_the_modest(guests: &[Guest]) -> (Vec<u64>, u64, u64) {
    let counts: Vec<u64> = guests[GREEDY..].iter().map(|one| one.answered).collect();
    let (least, most) = (counts.iter().min().copied(), counts.iter().max().copied());
    let (least, most) = least.zip(most).expect("modest disks");
    (counts, least, most)
}

/// Every guest goes on with its answers until `enough`.
fn go_on_until(guests: &mut [Guest], mut enough: impl FnMut(&[Guest]) -> bool) {
    while !enough(guests) {
        for ready in wait_for_answers(guests.iter().map(|guest| &guest.connection)) {
            guests[ready].go_on();
        }
    }
}

fn status_of_all(bench: &Bench) -> Vec<Value> {
    let status = http::call(&bench.path("agent.sock"), "GET", "/v1/status", None);
    status["disks"].as_array().expect("disks").clone()
}

#[test]
fn no_disk_of_many_lags_behind_the_others_whatever_becomes_of_some() {
    let bench = Bench::new();
    let (_receiver, mut agent) = (bench.receiver(), bench.agent());
    // The one on the dead device, when that is given up.
    agent.may_complain("the disk behind");
    let (api, stream) = (bench.path("agent.sock"), bench.socket("stream.sock"));
    let attach = |name: &str, image: &str| {
        let body = json!({ "name": name, "image": image, "receiver": stream });
        let disk = http::call(&api, "POST", "/v1/disks", Some(&body));
        disk["nbd_uri"].as_str().expect("a URI").to_owned()
    };
    let uris: Vec<String> = (1..DISKS)
        .map(|nth| attach(&format!("d{nth}"), bench.image(&format!("d{nth}.img"), SIZE).to_str().unwrap()))
        .collect();
    let behind = LoggedDisk::start(&bench, "behind", SIZE);
    let dead = attach("dead", &behind.uri);
    while status_of_all(&bench).iter().any(|disk| disk["mode"] != "sync") {}

    let mut guests: Vec<Guest> = uris
        .iter()
        .enumerate()
        .map(|(nth, uri)| match nth < GREEDY {
            true => Guest::begin(uri, 64 << 10, DEPTH),
            false => Guest::begin(uri, 4096, 1),
        })
        .collect();
    round(&mut guests, "all are well");

    behind.signal("STOP");
    let mut waiting = Guest::begin(&dead, 4096, 8);
    waiting.connection.send_flush().unwrap();
    round(&mut guests, "one device is dead");
    assert_eq!(waiting.connection.answers_there(), 0, "nobody answers for a dead device");

    // As much as an export lets in, and of the answers nobody hears any. Its disk has a guest that does.
    let mut deaf = Connection::open(&uris[GREEDY]);
    for _ in 0..64 {
        deaf.send_read(0, 1 << 20).unwrap();
    }
    // What its disk reads for it until it is held back is its disk's own to do, and once.
    guests[GREEDY].answered = 0;
    go_on_until(&mut guests, |guests| guests[GREEDY].answered >= ANSWERS);
    round(&mut guests, "and a guest of the first modest disk is deaf");
    assert_eq!(waiting.connection.answers_there(), 0);

    behind.signal("CONT");
    for _ in 0..9 {
        waiting.connection.answer().expect("the device lives again");
    }
    drop(deaf);
    round(&mut guests, "all are well again");
    drop((guests, waiting));
    let lags = |disk: &Value| {
        disk["mode"] != "sync"
            || disk["dirty"]["blocks"] != 0
            || disk["lsn"]["durable"] != disk["lsn"]["last"]
    };
    while status_of_all(&bench).iter().any(lags) {}
    assert_eq!(agent.stop(), 0);
}
