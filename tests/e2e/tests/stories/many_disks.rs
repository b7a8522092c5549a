//! Many disks on one agent: one that stands still is alone with it.

use backtide_e2e::{Bench, Load, Reconnecting, http, tools};
use serde_json::json;

const SIZE: u64 = 16 << 20;

const DISKS: usize = 64;

#[test]
fn a_disk_that_stands_still_holds_up_none_of_many() {
    let bench = Bench::new();
    let (_receiver, agent) = (bench.receiver(), bench.agent());
    let (api, stream) = (bench.path("agent.sock"), bench.socket("stream.sock"));
    let attach = |name: &str, image: &str| {
        let body = json!({ "name": name, "image": image, "receiver": stream });
        http::call(&api, "POST", "/v1/disks", Some(&body))
    };
    let empty = agent.memory_peak();
    for nth in 0..DISKS - 1 {
        let image = bench.image(&format!("d{nth}.img"), SIZE);
        attach(&format!("d{nth}"), image.to_str().unwrap());
    }
    let each = agent.memory_peak().saturating_sub(empty) / DISKS as u64;
    println!("each of {DISKS} idle disks costs the agent {} KiB at most", each / 1024);
    bench.image("behind.img", SIZE);
    let (image, socket) = (bench.name("behind.img"), bench.name("behind.sock"));
    let server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-t", "-e", "8", "-k", &socket, &image]);
    tools::wait_for_socket(socket.as_ref());
    let stuck = bench.attach("stuck", &format!("nbd+unix:///?socket={socket}"), &[]);
    stuck.wait("sync");
    server.signal("STOP");
    // Its end waits for the server, which has to flush.
    let detaching = http::ask(&api, "DELETE", "/v1/disks/stuck", None);
    let disk = |nth: usize| format!("/v1/disks/d{nth}");
    http::call(&api, "DELETE", &disk(0), None);
    let image = bench.name("d0.img");
    let again = attach("d0", &image);
    assert_eq!(again["epoch"], 2, "{again}");
    let front = Reconnecting::before(&bench, "d1", &bench.path("d1.nbd"));
    let load = Load::start(&front.uri, 2);
    load.goes_on(50);
    let status = http::call(&api, "GET", "/v1/status", None);
    let disks = status["disks"].as_array().unwrap();
    let stuck = disks.iter().find(|disk| disk["name"] == "stuck");
    assert_eq!(stuck.map(|disk| disk["reason_code"].clone()), Some(json!("detaching")), "{status}");
    assert_eq!(disks.len(), DISKS, "{status}");
    server.signal("CONT");
    drop(detaching);
    // All of them, under a guest's load, to the next agent.
    let restarted = bench.run(&["agent", "restart"]);
    println!("restart with {DISKS} disks: {restarted:?}");
    // A machine that is slow enough serves some of them a little later than the API.
    assert!(matches!(restarted.code, 0 | 3), "{restarted:?}");
    load.goes_on(50);
    let written = load.stop();
    println!("the guest's slowest request took {:?}", written.slowest);
    loop {
        let status = http::call(&api, "GET", "/v1/status", None);
        let disks = status["disks"].as_array().unwrap();
        assert!(disks.len() >= DISKS - 1, "{status}");
        if disks.iter().all(|disk| disk["mode"] != "detached") {
            break;
        }
    }
    assert_eq!(agent.stop(), 0);
}
