//! Which certificates may take the place of others.
//!
//! Invariant: those in use that are valid give way to valid ones only. Whoever has none that are valid takes what there is:
//! it is no worse.

use std::path::Path;

use backtide_units::CaptureTime;

use crate::{Certificate, TlsError};

/// Whether `new`, the certificates of `file` and those that lead to their authority, may take the place of `old`.
///
/// # Errors
/// What is wrong with the new ones, where the old ones are better.
pub(crate) fn check(
    new: &[Certificate],
    old: &[Certificate],
    file: &Path,
    now: CaptureTime,
) -> Result<(), TlsError> {
    if old.iter().any(|certificate| !is_valid(certificate, now)) {
        return Ok(());
    }
    let path = || file.to_path_buf();
    if new.is_empty() && !old.is_empty() {
        return Err(TlsError::Empty { path: path() });
    }
    let Some(wrong) = new.iter().find(|certificate| !is_valid(certificate, now)) else { return Ok(()) };
    let subject = wrong.subject.clone();
    Err(if now > wrong.not_after {
        TlsError::Expired { path: path(), subject, at: time_text(wrong.not_after) }
    } else {
        TlsError::NotYetValid { path: path(), subject, at: time_text(wrong.not_before) }
    })
}

/// The last moment at which all of these are valid.
pub(crate) fn end(chain: &[Certificate]) -> Option<CaptureTime> {
    chain.iter().map(|certificate| certificate.not_after).min()
}

fn is_valid(certificate: &Certificate, now: CaptureTime) -> bool {
    (certificate.not_before..=certificate.not_after).contains(&now)
}

/// A time as people and programs read it, in whole seconds.
pub(crate) fn time_text(time: CaptureTime) -> String {
    let seconds = i64::try_from(time.0 / 1_000_000).ok();
    let time = seconds.and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    time.map_or_else(|| "the end of time".to_owned(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid(from: u64, to: u64) -> Certificate {
        Certificate {
            subject: "kvm-3".into(),
            hosts: vec![],
            uris: vec![],
            not_before: CaptureTime(from * 1_000_000),
            not_after: CaptureTime(to * 1_000_000),
        }
    }

    #[test]
    fn a_good_certificate_gives_way_to_a_good_one_only() {
        let (file, now) = (Path::new("/pki/client-cert.pem"), CaptureTime(100_000_000));
        let (good, ended, early) = (valid(0, 200), valid(0, 99), valid(101, 300));
        let chain = |certificates: &[&Certificate]| -> Vec<Certificate> {
            certificates.iter().copied().cloned().collect()
        };
        let told = |new: &[&Certificate], old: &[&Certificate]| {
            check(&chain(new), &chain(old), file, now).map_err(|error| error.to_string())
        };
        assert_eq!(told(&[&valid(100, 100)], &[&good]), Ok(()), "both ends belong to it");
        assert_eq!(
            told(&[&ended], &[&good]).unwrap_err(),
            r#"the certificate of kvm-3 in "/pki/client-cert.pem" has expired at 1970-01-01T00:01:39Z"#
        );
        let why = told(&[&early], &[&good]).unwrap_err();
        assert!(why.contains("is not valid before 1970-01-01T00:01:41Z"), "{why}");
        assert!(told(&[&good, &ended], &[&good]).is_err(), "one that leads to the authority has expired");
        assert!(told(&[], &[&good]).is_err(), "none any more");
        assert!(told(&[&ended], &[]).is_err(), "none is better than one that is refused");
        assert_eq!(told(&[], &[]), Ok(()));
        for new in [&ended, &early, &good] {
            assert_eq!(told(&[new], &[&good, &ended]), Ok(()), "the old one is no better");
            assert_eq!(told(&[new], &[&early]), Ok(()));
        }
        assert_eq!(end(&[good, ended]), Some(CaptureTime(99_000_000)));
    }
}
