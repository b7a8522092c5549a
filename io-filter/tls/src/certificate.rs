//! What a certificate says of itself: whose it is, for which names, from when until when.

use std::time::{Duration, SystemTime};

use backtide_units::CaptureTime;

use crate::der::{GENERAL_TIME, INTEGER, OBJECT, OCTETS, Reader, SEQUENCE, SET, UTC_TIME, time_us};

/// `2.5.4.3`, a common name.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// `2.5.29.17`, subject alternative names.
const ALTERNATIVE_NAMES: &[u8] = &[0x55, 0x1d, 0x11];

/// A certificate that has less than this left ends soon, ...
const SOON: Duration = Duration::from_secs(30 * 24 * 3600);
/// ... unless its whole life is so short that this part of it is less.
const SOON_PART: u64 = 3;

/// The longest text that is taken from a certificate.
const TEXT_MAX: usize = 256;

/// What is read from a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Whose it is, in few words: the common name, or else the first name it is for.
    pub subject: String,
    /// Its names of hosts.
    pub hosts: Vec<String>,
    /// Its names that are URIs.
    pub uris: Vec<String>,
    /// Since when it is valid.
    pub not_before: CaptureTime,
    /// The last moment at which it is.
    pub not_after: CaptureTime,
}

/// The X.509 version of a certificate in DER; none where the bytes are no certificate.
pub(crate) fn version(der: &[u8]) -> Option<u32> {
    let mut body = Reader(Reader(Reader(der).expect(SEQUENCE)?).expect(SEQUENCE)?);
    // Version 1 is said by saying nothing.
    let Some(told) = body.optional(0xa0) else { return Some(1) };
    let number = Reader(told).expect(INTEGER)?;
    number.first().map(|number| u32::from(*number) + 1)
}

impl Certificate {
    /// Reads one in DER; none where the bytes are no certificate.
    pub fn read(der: &[u8]) -> Option<Self> {
        let mut certificate = Reader(Reader(der).expect(SEQUENCE)?);
        let mut body = Reader(certificate.expect(SEQUENCE)?);
        // Version, serial number, algorithm, issuer.
        let _ = body.optional(0xa0);
        for _ in 0..3 {
            body.next()?;
        }
        let mut validity = Reader(body.expect(SEQUENCE)?);
        let not_before = time(&mut validity)?;
        let not_after = time(&mut validity)?;
        let common_name = common_name(body.expect(SEQUENCE)?);
        // The key.
        body.next()?;
        let (mut hosts, mut uris) = (Vec::new(), Vec::new());
        while let Some((tag, content)) = body.next() {
            if tag == 0xa3 {
                // Names decide what a peer may do: those that cannot be read are not none.
                for (tag, name) in alternative_names(content)? {
                    if tag == 0x82 { hosts.push(name) } else { uris.push(name) }
                }
            }
        }
        let subject = common_name.or_else(|| hosts.first().cloned()).or_else(|| uris.first().cloned());
        let subject = subject.unwrap_or_else(|| "nobody by name".to_owned());
        Some(Self { subject, hosts, uris, not_before, not_after })
    }

    /// Whether a person should see to a new one: less than 30 days are left, or less than a third
    /// of the life of one that lives shorter than 90.
    pub fn ends_soon(&self, now: CaptureTime) -> bool {
        let life = self.not_after.0.saturating_sub(self.not_before.0);
        let soon = u64::try_from(SOON.as_micros()).unwrap_or(u64::MAX).min(life / SOON_PART);
        self.not_after.0 < now.0.saturating_add(soon)
    }

    /// As [`warning`](Self::warning), of this moment.
    pub fn warning_now(&self, place: &str) -> Option<String> {
        self.warning(place, now())
    }

    /// A sentence about its end when that is near or past, for whoever looks after `file`.
    pub fn warning(&self, file: &str, now: CaptureTime) -> Option<String> {
        if !self.ends_soon(now) {
            return None;
        }
        let left = Duration::from_micros(self.not_after.0.saturating_sub(now.0));
        let subject = &self.subject;
        Some(match (left.as_secs() / 86_400, left.as_secs() / 3600) {
            (0, 0) if left.is_zero() => format!("the certificate of {subject} ({file}) has expired"),
            (0, 0) => format!("the certificate of {subject} ({file}) expires within the hour"),
            (0, hours) => format!("the certificate of {subject} ({file}) expires in {hours} h"),
            (days, _) => format!("the certificate of {subject} ({file}) expires in {days} days"),
        })
    }
}

/// The wall clock, as certificates are judged by it.
pub(crate) fn now() -> CaptureTime {
    SystemTime::now().into()
}

fn time(validity: &mut Reader<'_>) -> Option<CaptureTime> {
    let (tag, text) = validity.next().filter(|(tag, _)| matches!(*tag, UTC_TIME | GENERAL_TIME))?;
    time_us(tag, text).map(CaptureTime)
}

fn common_name(subject: &[u8]) -> Option<String> {
    let mut parts = Reader(subject);
    while let Some(part) = parts.expect(SET) {
        let mut attribute = Reader(Reader(part).expect(SEQUENCE)?);
        if attribute.expect(OBJECT)? == COMMON_NAME {
            return attribute.next().map(|(_, text)| printable(text)).filter(|text| !text.is_empty());
        }
    }
    None
}

/// Names of hosts (tag 0x82) and URIs (tag 0x86).
fn alternative_names(extensions: &[u8]) -> Option<Vec<(u8, String)>> {
    let mut extensions = Reader(Reader(extensions).expect(SEQUENCE)?);
    while let Some(extension) = extensions.expect(SEQUENCE) {
        let mut extension = Reader(extension);
        if extension.expect(OBJECT)? != ALTERNATIVE_NAMES {
            continue;
        }
        // Whether it is critical.
        let _ = extension.optional(0x01);
        let mut names = Reader(Reader(extension.expect(OCTETS)?).expect(SEQUENCE)?);
        let mut found = Vec::new();
        while let Some((tag, text)) = names.next() {
            if matches!(tag, 0x82 | 0x86) {
                found.push((tag, printable(text)));
            }
        }
        return names.0.is_empty().then_some(found);
    }
    extensions.0.is_empty().then(Vec::new)
}

/// Foreign text as it may stand in a log.
fn printable(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.chars().map(|c| if c.is_control() { '?' } else { c }).take(TEXT_MAX).collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn made(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["kvm-3".to_owned()]).unwrap();
        change(&mut params);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn a_certificate_tells_whose_it_is_and_until_when() {
        let der = made(|params| {
            params.distinguished_name.push(DnType::OrganizationName, "somebody");
            params.distinguished_name.push(DnType::CommonName, "kvm-3\nroot");
            params.subject_alt_names.push(SanType::URI("backtide:disk/vm1".try_into().unwrap()));
            params.not_before = rcgen::date_time_ymd(2026, 1, 1);
            params.not_after = rcgen::date_time_ymd(2051, 1, 1);
        });
        let read = Certificate::read(&der).unwrap();
        // Of rcgen's default and ours the name given last counts.
        assert_eq!(read.subject, "kvm-3?root");
        assert_eq!((read.hosts, read.uris), (vec!["kvm-3".to_owned()], vec!["backtide:disk/vm1".to_owned()]));
        assert_eq!(read.not_before.0, 1_767_225_600_000_000);
        assert_eq!(read.not_after.0, 2_556_144_000_000_000);
    }

    #[test]
    fn what_is_cut_off_or_bent_is_no_certificate_and_no_panic() {
        let der = made(|_| ());
        for end in 0..der.len() {
            assert_eq!(Certificate::read(&der[..end]), None, "{end}");
        }
        for at in 0..der.len() {
            for bit in 0..8 {
                let mut bent = der.clone();
                bent[at] ^= 1 << bit;
                let _ = Certificate::read(&bent);
            }
        }
    }

    #[test]
    fn an_end_is_announced_in_time() {
        let day = 24 * 3600 * 1_000_000;
        let certificate = |days: u64| Certificate {
            subject: "kvm-3".into(),
            hosts: vec![],
            uris: vec![],
            not_before: CaptureTime(0),
            not_after: CaptureTime(days * day),
        };
        let warned = |days, at: u64| certificate(days).warning("/pki/client-cert.pem", CaptureTime(at));
        assert_eq!(warned(365, 334 * day), None);
        let soon = warned(365, 336 * day).unwrap();
        assert_eq!(soon, "the certificate of kvm-3 (/pki/client-cert.pem) expires in 29 days");
        assert!(warned(365, 366 * day).unwrap().ends_with("has expired"));
        assert_eq!(warned(3, day), None, "one of three days is renewed every day");
        assert!(warned(3, 2 * day + day / 2).unwrap().ends_with("expires in 12 h"));
    }
}
