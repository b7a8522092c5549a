//! The recovery table: what a scan does with what it finds where the next entry must stand.
//!
//! | header | payload | acknowledged | verdict |
//! |---|---|---|---|
//! | good | good | any | accept |
//! | good | wrong | yes | accept, damaged: reads of it give an error, the log goes on |
//! | good | wrong | no | end: a torn write |
//! | good | lost | yes | damage |
//! | good | lost | no | end |
//! | none, or bad | - | yes | damage |
//! | none, or bad | - | no | end |
//!
//! *Acknowledged* means that some later entry or header, of this or a later segment, was written when
//! this entry number was already durable. A power cut cannot undo that, so what is missing is damage
//! and never cut. *Lost* is a payload that the file is too short for, or the text of a control entry:
//! without it the log cannot go on. So is a batch's whose end cannot be found.

/// What stands where a header must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderState {
    /// The next entry's header.
    Good,
    /// Nothing: zeros or the end of the file.
    None,
    /// Bytes that are no header, or not the next one's.
    Bad,
}

/// What stands behind a good header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadState {
    /// The payload.
    Good,
    /// Other bytes than the payload's checksum says; the next entry can still be found.
    Wrong,
    /// Not a payload that the log can go on without.
    Lost,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Take the entry.
    Accept,
    /// Take the entry and report it: its payload is damaged.
    AcceptDamaged,
    /// The log ends here; cut.
    End,
    /// Refuse the log: acknowledged entries are missing.
    Damage,
}

/// The table. `payload` counts only behind a good header.
pub fn verdict(header: HeaderState, payload: PayloadState, acknowledged: bool) -> Verdict {
    match (header, payload, acknowledged) {
        (HeaderState::Good, PayloadState::Good, _) => Verdict::Accept,
        (HeaderState::Good, PayloadState::Wrong, true) => Verdict::AcceptDamaged,
        (HeaderState::Good, PayloadState::Wrong | PayloadState::Lost, false) => Verdict::End,
        (HeaderState::Good, PayloadState::Lost, true) => Verdict::Damage,
        (HeaderState::None | HeaderState::Bad, _, true) => Verdict::Damage,
        (HeaderState::None | HeaderState::Bad, _, false) => Verdict::End,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADERS: [HeaderState; 3] = [HeaderState::Good, HeaderState::None, HeaderState::Bad];
    const PAYLOADS: [PayloadState; 3] = [PayloadState::Good, PayloadState::Wrong, PayloadState::Lost];

    #[test]
    fn what_was_acknowledged_is_never_cut() {
        for header in HEADERS {
            for payload in PAYLOADS {
                assert_ne!(verdict(header, payload, true), Verdict::End, "{header:?} {payload:?}");
            }
        }
    }

    #[test]
    fn a_torn_tail_never_refuses_the_log() {
        for header in HEADERS {
            for payload in PAYLOADS {
                let verdict = verdict(header, payload, false);
                let whole = header == HeaderState::Good && payload == PayloadState::Good;
                let expected = if whole { Verdict::Accept } else { Verdict::End };
                assert_eq!(verdict, expected, "{header:?} {payload:?}");
            }
        }
    }

    #[test]
    fn only_a_whole_entry_is_taken_without_a_word() {
        for header in HEADERS {
            for payload in PAYLOADS {
                let whole = header == HeaderState::Good && payload == PayloadState::Good;
                assert_eq!(verdict(header, payload, true) == Verdict::Accept, whole);
            }
        }
        assert_eq!(verdict(HeaderState::Good, PayloadState::Wrong, true), Verdict::AcceptDamaged);
        assert_eq!(verdict(HeaderState::Good, PayloadState::Lost, true), Verdict::Damage);
    }
}
