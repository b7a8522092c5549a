//! What is told of a clock that is not the receiver's.

use std::time::SystemTime;

use backtide_protocol::{Hello, Message, Ping};
use backtide_receiver_api::{DiffRequest, FindChangeRequest};
use backtide_units::{ByteOffset, CaptureTime, DiskName, Lsn};

use crate::{agent::*, fixture::*, going_back::request};

const HOUR_US: i64 = 3_600_000_000;

fn vm1() -> DiskName {
    "vm1".parse().unwrap()
}

fn now() -> CaptureTime {
    SystemTime::now().into()
}

/// Answers what the receiver's clock shows now, with a clock that is ahead by so much.
async fn answer_clock(agent: &mut Agent, ahead_us: i64) {
    let heard = now();
    let sent = CaptureTime((heard.0 as i64 + ahead_us) as u64);
    agent.send(&Message::Ping(Ping { sent: Some(sent), heard: Some(heard) })).await;
    agent.all_durable().await;
}

/// A disk in sync whose agent's clock is ahead by so much: all was captured just now.
async fn attached_with_clock(receiver: &backtide_log_receiver::Receiver, ahead_us: i64) -> Agent {
    let stamped = CaptureTime((now().0 as i64 + ahead_us) as u64);
    let (mut agent, _) = Agent::welcomed(receiver, hello(1, "vm1")).await;
    let begin = match pass_begin(5, 0, backtide_units::Reason::FirstAttach) {
        Message::PassBegin { at, gap_from, reason, .. } => {
            Message::PassBegin { at, gap_from, time: stamped, reason }
        }
        other => panic!("{other:?}"),
    };
    agent.send(&begin).await;
    let end = match pass_end(5) {
        Message::PassEnd { at, valid_from, .. } => Message::PassEnd { at, valid_from, time: stamped },
        other => panic!("{other:?}"),
    };
    agent.send(&end).await;
    agent.all_durable().await;
    answer_clock(&mut agent, ahead_us).await;
    agent
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_of_another_clock_is_given_with_a_warning() {
    for (ahead_us, said) in [
        (-HOUR_US, "disk vm1 is stamped 1h 0m behind the receiver's clock or more"),
        (-40_000_000, "disk vm1 is stamped 40s behind the receiver's clock or more"),
        (HOUR_US, "ahead of the receiver's clock"),
    ] {
        let place = Place::new();
        let receiver = place.start().await;
        let _agent = attached_with_clock(&receiver, ahead_us).await;
        let api = client(&receiver);
        // Ahead no point is so old: only a time that has not come yet is one.
        let asked = match ahead_us < 0 {
            true => "-0s".to_owned(),
            false => {
                let disk = &api.disks(Some(&vm1())).await.unwrap().disks[0];
                backtide_recovery::time_text(disk.last_time.unwrap())
            }
        };
        if ahead_us > 0 {
            let refused = api.resolve(&vm1(), "-1s").await.unwrap_err();
            let hint = refused.hint.unwrap_or_default();
            assert!(refused.message.contains("outside the timeline") && hint.contains(said), "{hint}");
            let hint = api.resolve(&vm1(), "lsn:999").await.unwrap_err().hint.unwrap_or_default();
            assert!(!hint.contains(said), "an LSN is what it is: {hint}");
        }
        let told = api.resolve(&vm1(), &asked).await.unwrap();
        let warning = told.warning.unwrap();
        assert!(warning.starts_with(&format!("{asked} may be another moment than is meant")), "{warning}");
        assert!(warning.contains(said), "{warning}");
        let warned = |warning: Option<String>| assert!(warning.unwrap().contains(said), "{asked}");
        warned(api.around(&vm1(), &asked).await.unwrap().warning);
        warned(api.mount(&request(&asked, None)).await.unwrap().warning);
        let since = backtide_receiver_api::MountRequest {
            changed_since: Some(asked.clone()),
            ..request("latest", None)
        };
        let mount = api.mount(&since).await.unwrap();
        assert_eq!(mount.warning, None);
        warned(mount.changed_since.unwrap().warning);
        let diff = DiffRequest { from: asked.clone(), to: "latest".to_owned() };
        let diff = api.diff(&vm1(), &diff).await.unwrap();
        warned(diff.from.warning);
        assert_eq!(diff.to.warning, None, "latest is that whatever the clocks say");
        let change = FindChangeRequest { offset: ByteOffset(0), at: asked.clone() };
        warned(api.find_change(&vm1(), &change).await.unwrap().at.warning);
        let disk = api.disks(None).await.unwrap().disks.remove(0);
        assert!(disk.clock.unwrap().contains(said));
        receiver.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_of_the_same_clock_is_given_without_a_word() {
    let place = Place::new();
    let receiver = place.start().await;
    let agent = attached_with_clock(&receiver, 0).await;
    let api = client(&receiver);
    assert_eq!(api.resolve(&vm1(), "-0s").await.unwrap().warning, None);
    assert_eq!(api.disks(None).await.unwrap().disks[0].clock, None);
    drop(agent);
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_has_retained_is_stamped_by_the_same_clock_however_late_it_comes() {
    let place = Place::new();
    let receiver = place.start().await;
    let now = now();
    let ago = |hours: u64| CaptureTime(now.0 - hours * HOUR_US as u64);
    let record = |lsn: u64, time: CaptureTime| match write(lsn, 0, vec![1; 4096]) {
        Message::Record(record) => Message::Record(backtide_protocol::Record { time, ..record }),
        other => panic!("{other:?}"),
    };
    let api = client(&receiver);
    let clock = async || api.disks(None).await.unwrap().disks.remove(0).clock;
    let agent = attached_with_clock(&receiver, -5 * HOUR_US).await;
    assert!(clock().await.is_some());
    drop(agent);
    // It comes back after an outage of hours, with what it has captured meanwhile.
    let again = Hello { next_lsn: Lsn(9), ..hello(1, "vm1") };
    let (mut agent, _) = Agent::welcomed(&receiver, again).await;
    assert_eq!(clock().await, None, "it has said nothing yet");
    for (lsn, time) in [(6, ago(3)), (7, ago(2)), (8, ago(1))] {
        agent.send(&record(lsn, time)).await;
        agent.all_durable().await;
        assert_eq!(clock().await, None, "LSN {lsn}");
    }
    let after = "-1s";
    assert_eq!(api.resolve(&vm1(), after).await.unwrap().warning, None);
    // How it stamps what happens now is another matter.
    answer_clock(&mut agent, -HOUR_US).await;
    assert!(clock().await.unwrap().contains("1h 0m behind"));
    assert!(api.resolve(&vm1(), after).await.unwrap().warning.is_some());
    answer_clock(&mut agent, 0).await;
    assert_eq!(clock().await, None, "it was set right");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_after_the_last_word_of_an_agent_that_is_away_is_given_with_a_warning() {
    let place = Place::new();
    let receiver = place.start().await;
    let agent = attached_with_clock(&receiver, -1_000_000).await;
    let api = client(&receiver);
    let points = api.points(&vm1()).await.unwrap();
    assert_eq!(points.connected, Some(true));
    let last = backtide_recovery::time_text(points.last.unwrap().time);
    drop(agent);
    while api.points(&vm1()).await.unwrap().connected == Some(true) {
        tokio::task::yield_now().await;
    }
    let told = api.resolve(&vm1(), "-0s").await.unwrap();
    let warning = told.warning.unwrap();
    assert!(warning.starts_with("-0s is later than what the receiver has heard of disk vm1"), "{warning}");
    assert!(warning.contains(&last) && told.unheard, "{warning}");
    assert!(api.around(&vm1(), "-0s").await.unwrap().warning.is_some());
    assert!(api.mount(&request("-0s", None)).await.unwrap().warning.is_some());
    for known in ["latest", &last] {
        let told = api.resolve(&vm1(), known).await.unwrap();
        assert_eq!((told.warning, told.unheard), (None, false), "{known}");
    }
    receiver.shutdown().await;
}

/// Without a question nobody could answer.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_is_told_what_the_receivers_clock_shows_when_it_comes_and_time_and_again() {
    let place = Place::new();
    let mut config = place.config();
    config.limits.ping_interval_ms = 20;
    let receiver = backtide_log_receiver::Receiver::start(config).await.unwrap();
    let before = now();
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    let mut shown = vec![before];
    while shown.len() < 4 {
        match agent.next().await {
            Some(Message::Ping(Ping { sent, heard: None })) => shown.extend(sent),
            other => panic!("expected a ping, found {other:?}"),
        }
    }
    assert!(shown.is_sorted() && shown.iter().all(|time| *time <= now()), "{shown:?}");
    receiver.shutdown().await;
}

/// What it sends first is of the outage's begin: a time of later in it would be given as another point with every record.
#[tokio::test(flavor = "multi_thread")]
async fn a_time_that_an_agent_has_yet_to_send_something_of_is_given_with_a_warning() {
    let place = Place::new();
    let receiver = place.start().await;
    let api = client(&receiver);
    let now = now().0;
    let record = |lsn: u64| match write(lsn, 0, vec![1; 4096]) {
        Message::Record(record) => Message::Record(backtide_protocol::Record {
            time: CaptureTime(now - 60_000_000 + lsn * 1_000_000),
            ..record
        }),
        other => panic!("{other:?}"),
    };
    drop(attached_with_clock(&receiver, -HOUR_US).await);
    let again = Hello { next_lsn: Lsn(10), ..hello(1, "vm1") };
    let (mut agent, _) = Agent::welcomed(&receiver, again).await;
    let fixed = backtide_recovery::time_text(CaptureTime(now - 60_000_000 + 7_500_000));
    for lsn in 6..=9 {
        // A time is over when something later has come.
        for (asked, unheard) in [("-0s", true), (&*fixed, lsn <= 8)] {
            let told = api.resolve(&vm1(), asked).await.unwrap();
            assert_eq!(told.unheard, unheard, "before LSN {lsn}: {told:?}");
            let warning = told.warning.unwrap_or_default();
            assert_eq!(warning.contains("has not sent everything yet"), unheard, "{warning}");
        }
        for known in ["latest", "lsn:5"] {
            let told = api.resolve(&vm1(), known).await.unwrap();
            assert!(!told.unheard && told.warning.is_none(), "{told:?}");
        }
        agent.send(&record(lsn)).await;
        agent.all_durable().await;
    }
    let told = api.resolve(&vm1(), "-0s").await.unwrap();
    assert_eq!((told.unheard, told.warning, told.lsn), (false, None, Lsn(9)));
    receiver.shutdown().await;
}

/// LSNs that it has given and does not send are below the pass that follows.
#[tokio::test(flavor = "multi_thread")]
async fn a_pass_ends_what_an_agent_has_yet_to_send() {
    let place = Place::new();
    let receiver = place.start().await;
    let api = client(&receiver);
    drop(attached_with_clock(&receiver, -HOUR_US).await);
    let again = Hello { next_lsn: Lsn(1000), ..hello(1, "vm1") };
    let (mut agent, _) = Agent::welcomed(&receiver, again).await;
    assert!(api.resolve(&vm1(), "-0s").await.unwrap().unheard);
    agent.send(&pass_begin(1000, 5, backtide_units::Reason::AgentCrashed)).await;
    agent.all_durable().await;
    let refused = api.resolve(&vm1(), "-0s").await.unwrap_err();
    assert_eq!(refused.code, backtide_receiver_api::ErrorCode::PointInHole);
    agent.send(&pass_end(1000)).await;
    agent.all_durable().await;
    let told = api.resolve(&vm1(), "-0s").await.unwrap();
    assert_eq!((told.unheard, told.lsn), (false, Lsn(1000)), "{told:?}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_for_other_machines_in_the_clear_is_refused() {
    let place = Place::new();
    let receiver = place.start().await;
    let _agent = attached_with_clock(&receiver, 0).await;
    let api = client(&receiver);
    let at = |uri: &str| request("latest", Some(uri.to_owned()));
    let refused = api.mount(&at("nbd://0.0.0.0:10999/vm1")).await.unwrap_err();
    assert_eq!(refused.code, backtide_receiver_api::ErrorCode::Refused);
    assert!(refused.message.contains("--insecure"), "{refused}");
    let relative = api.mount(&at("nbd+unix:///vm1?socket=here.sock")).await.unwrap_err();
    assert_eq!(relative.code, backtide_receiver_api::ErrorCode::Usage);
    receiver.shutdown().await;
    let insecure = backtide_log_receiver::Config { insecure: true, ..place.config() };
    let receiver = backtide_log_receiver::Receiver::start(insecure).await.unwrap();
    let socket = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    drop(socket);
    let uri = format!("nbd://0.0.0.0:{port}/vm1");
    let writable = backtide_receiver_api::MountRequest { writable: true, ..at(&uri) };
    client(&receiver).mount(&writable).await.unwrap();
    receiver.shutdown().await;
    // Nor is one that was allowed once served again where it is not.
    let receiver = place.start().await;
    let mounts = client(&receiver).mounts().await.unwrap();
    assert!(mounts.mounts.is_empty(), "{mounts:?}");
    let why = mounts.kept[0].problem.clone().unwrap();
    assert!(why.contains(&format!("not served at {uri}")) && why.contains("--insecure"), "{why}");
    std::net::TcpStream::connect(("127.0.0.1", port)).expect_err("nobody listens there");
    receiver.shutdown().await;
    let open = backtide_log_receiver::Config {
        nbd_listen: Some("nbd://0.0.0.0:10999".to_owned()),
        ..place.config()
    };
    assert!(place.refusal(open).await.contains("nbd_listen: nbd://0.0.0.0:10999"));
}
