//! Whether disks' streams are kept from others, and for how long yet.

use backtide_agent_api::AgentStatus;
use backtide_control::Address;
use backtide_export::NbdUri;
use backtide_receiver_api::ReceiverStatus;
use backtide_units::CaptureTime;

use super::{Finding, Verdict};
use crate::quantity::{count_text, time_text};

/// What to do about a certificate.
const RENEW: &str = "`backtide pki issue` makes a new one; daemons take it without a restart";

/// The receiver's certificates, of streams and NBD sockets; nothing where nothing comes under TLS.
pub(super) fn receiver(receiver: &ReceiverStatus, now: CaptureTime) -> Vec<Finding> {
    let mut warnings = receiver.certificate_warnings.clone();
    let certificate = receiver.certificate.as_ref();
    warnings.extend(certificate.iter().flat_map(|certificate| certificate.warnings.clone()));
    warnings.sort();
    warnings.dedup();
    if let Some(certificate) = certificate.filter(|_| warnings.is_empty()) {
        let until = time_text(certificate.not_after);
        return vec![Finding::ok("streams", format!("the receiver's certificate is valid until {until}"))];
    }
    let ended = certificate.is_some_and(|certificate| certificate.not_after < now);
    let mut findings: Vec<_> = warnings.iter().map(|warning| warned(warning)).collect();
    if ended {
        let message = "the receiver's certificate has expired: no agent can connect, and streams that are there are the last";
        findings.insert(0, Finding::new("streams", Verdict::Failed, message).hint(RENEW));
    }
    findings
}

/// The agent's, and disks whose streams others can read. Each thing is said once.
pub(super) fn disks(agent: &AgentStatus, now: CaptureTime) -> Vec<Finding> {
    let disks = &agent.disks;
    let of_disks = disks.iter().filter_map(|disk| disk.stream_tls.as_ref()).flat_map(|tls| &tls.warnings);
    let mut warnings: Vec<&String> = agent.certificate_warnings.iter().chain(of_disks).collect();
    warnings.sort();
    warnings.dedup();
    let mut findings: Vec<Finding> = warnings.into_iter().map(|warning| warned(warning)).collect();
    for disk in disks {
        let Some(tls) = &disk.stream_tls else { continue };
        let ended = |until: Option<CaptureTime>| until.is_some_and(|until| until < now);
        // What the receiver showed when the stream began is asked for anew only by the next one.
        let whose = match (ended(tls.not_after), ended(tls.receiver_not_after) && !disk.connected) {
            (true, _) => "the agent's",
            (false, true) => "its receiver's",
            (false, false) => continue,
        };
        let message = format!("{}: {whose} certificate has expired: its stream cannot begin anew", disk.name);
        findings.insert(0, Finding::new("streams", Verdict::Failed, message).hint(RENEW));
    }
    for disk in disks.iter().filter(|disk| is_in_the_clear(&disk.receiver)) {
        let message = format!("{}: its stream to {} is in the clear", disk.name.as_str(), disk.receiver);
        findings.push(
            Finding::new("streams", Verdict::Warning, message)
                .hint("use tls:// (README.md, \"Over a network\") unless nobody else is on that network"),
        );
    }
    let secured = disks.iter().filter(|disk| disk.stream_tls.is_some()).count() as u64;
    if findings.is_empty() && secured > 0 {
        findings.push(Finding::ok("streams", format!("{} under TLS", count_text(secured, "stream"))));
    }
    findings
}

/// What is served over NBD to other machines in the clear.
pub(super) fn open_to_others(served: &[(&str, String, String)]) -> Vec<Finding> {
    let open =
        served.iter().filter(|(_, _, uri)| uri.parse::<NbdUri>().is_ok_and(|uri| uri.is_open_to_others()));
    let finding = |(_, what, uri): &(&str, String, String)| {
        let message = format!("{what} is served at {uri} in the clear, to whoever reaches this address");
        Finding::new("nbd", Verdict::Warning, message)
            .hint("use nbds:// or --nbd-tls required (docs/cli.md) unless nobody else is on that network")
    };
    open.map(finding).collect()
}

fn warned(warning: &str) -> Finding {
    Finding::new("streams", Verdict::Warning, warning).hint(RENEW)
}

/// TCP that leaves this machine, as far as its address tells.
fn is_in_the_clear(receiver: &Address) -> bool {
    match receiver {
        Address::Unix(_) | Address::Tls { .. } => false,
        Address::Tcp { host, .. } => {
            let loopback = host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
            !loopback && host != "localhost"
        }
    }
}

#[cfg(test)]
mod tests {
    use backtide_agent_api::{DiskStatus, StreamTlsStatus};

    use super::*;
    use crate::output::status::tests::in_sync;

    const NOW: CaptureTime = CaptureTime(1_000_000_000);

    #[test]
    fn what_is_served_to_other_machines_in_the_clear_is_told() {
        let served = |uri: &str| vec![("agent", "disk vm1".to_owned(), uri.to_owned())];
        for quiet in
            ["nbd://127.0.0.1:1/d", "nbd+unix:///d?socket=/s", "nbds://0.0.0.0:1/d?tls-certificates=/c"]
        {
            assert_eq!(open_to_others(&served(quiet)), [], "{quiet}");
        }
        let found = open_to_others(&served("nbd://0.0.0.0:10809/vm1"));
        assert_eq!((found.len(), found[0].verdict), (1, Verdict::Warning));
        assert!(found[0].message.starts_with("disk vm1 is served at nbd://0.0.0.0:10809/vm1"), "{found:?}");
    }

    #[test]
    fn what_others_can_read_and_what_ends_soon_is_said_once() {
        let at = |address: &str| DiskStatus { receiver: address.parse().unwrap(), ..in_sync() };
        let tls = |warnings: &[&str]| DiskStatus {
            stream_tls: Some(StreamTlsStatus {
                warnings: warnings.iter().map(|warning| (*warning).to_owned()).collect(),
                ..StreamTlsStatus::default()
            }),
            ..at("tls://backup:7301")
        };
        let quiet = [at("unix:/r"), at("tcp://127.0.0.1:1"), at("tcp://[::1]:1"), at("tcp://localhost:1")];
        let agent = |warnings: &[&str], disks: &[DiskStatus]| AgentStatus {
            version: "1".to_owned(),
            now: None,
            instance: String::new(),
            restart_failure: None,
            nbd_listen: None,
            certificate_warnings: warnings.iter().map(|warning| (*warning).to_owned()).collect(),
            disks: disks.to_vec(),
        };
        assert_eq!(disks(&agent(&[], &quiet), NOW), []);
        let under_tls = [tls(&[]), tls(&[])];
        assert_eq!(disks(&agent(&[], &under_tls), NOW), [Finding::ok("streams", "2 streams under TLS")]);
        let ending = [tls(&["it ends"]), tls(&["it ends"]), at("tcp://10.0.0.5:7300")];
        let found = disks(&agent(&["it ends", "a key does not fit"], &ending), NOW);
        let said: Vec<_> = found.iter().map(|finding| finding.message.as_str()).collect();
        let in_the_clear = "vm1: its stream to tcp://10.0.0.5:7300 is in the clear";
        assert_eq!(said, ["a key does not fit", "it ends", in_the_clear]);
        let lasting = |not_after| StreamTlsStatus {
            not_after: Some(CaptureTime(not_after)),
            ..StreamTlsStatus::default()
        };
        let disk = |not_after| DiskStatus { stream_tls: Some(lasting(not_after)), ..at("tls://backup:7301") };
        let found = disks(&agent(&["it has expired"], &[disk(NOW.0 - 1)]), NOW);
        let verdicts: Vec<_> = found.iter().map(|finding| finding.verdict).collect();
        assert_eq!(verdicts, [Verdict::Failed, Verdict::Warning], "{found:?}");
        assert_eq!(disks(&agent(&[], &[disk(NOW.0)]), NOW)[0].verdict, Verdict::Ok);
    }
}
