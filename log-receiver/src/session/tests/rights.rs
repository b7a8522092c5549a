//! Which disks a connection may claim.

use backtide_protocol::{CloseCode, Hello, Message};
use backtide_tls::{Certificate, Rights, WhichDisks};
use backtide_units::Epoch;
use uuid::Uuid;

use super::fixture::*;
use crate::Session;

fn rights(patterns: &[&str]) -> Rights {
    let certificate = Certificate {
        subject: "kvm-3".into(),
        hosts: vec![],
        uris: patterns.iter().map(|pattern| Rights::uri(pattern)).collect(),
        not_before: Default::default(),
        not_after: Default::default(),
    };
    Rights::of(&certificate, WhichDisks::Named)
}

#[test]
fn a_claim_needs_the_right_to_the_name_a_disk_has_as_well_as_to_the_one_it_is_given() {
    let mut bench = Bench::new();
    let _ = bench.welcomed(hello());
    bench.restart();
    let mut claim = |patterns: &[&str], name: &str| {
        let mut peer = bench.connect();
        peer.session = Session::with_rights(peer.id, rights(patterns));
        let (epoch, attach) = (Epoch(9), Uuid::from_u128(9));
        let hello = Hello { name: name.parse().unwrap(), epoch, attach, ..hello() };
        peer.send(&mut bench, Message::Hello(hello))
    };
    let known = hello().name.to_string();
    for (patterns, name) in [
        (&["other"][..], known.as_str()),
        // The disk by its id, under a name that is allowed.
        (&["other"], "other"),
        (&[known.as_str()], "other"),
        (&[], known.as_str()),
    ] {
        match claim(patterns, name).as_slice() {
            [Seen::Close(CloseCode::Denied, why), Seen::End] => assert!(why.contains("kvm-3"), "{why}"),
            other => panic!("{patterns:?} {name}: {other:?}"),
        }
    }
    assert_eq!(claim(&[known.as_str(), "oth*"], "other"), []);
    assert_eq!(bench.disks.iter().count(), 1, "a refused hello makes no disk");
}
