//! Reading DER, as far as it takes to tell what a certificate says of itself.
//!
//! Nothing is decided on its words that rustls has not verified before: it is for people, for the
//! end of a validity, and for the names in a verified peer's certificate. Bytes are foreign all the
//! same: every length is checked against what is there.

/// `SEQUENCE`
pub(crate) const INTEGER: u8 = 0x02;
pub(crate) const SEQUENCE: u8 = 0x30;
/// `SET`
pub(crate) const SET: u8 = 0x31;
/// `OBJECT IDENTIFIER`
pub(crate) const OBJECT: u8 = 0x06;
/// `OCTET STRING`
pub(crate) const OCTETS: u8 = 0x04;
/// `UTCTime`
pub(crate) const UTC_TIME: u8 = 0x17;
/// `GeneralizedTime`
pub(crate) const GENERAL_TIME: u8 = 0x18;

/// What is left of a run of elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    /// The next element's tag and content; none at the end, and where the bytes make no sense.
    pub(crate) fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, rest) = rest.split_first()?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81..=0x84 => {
                let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                (digits.iter().fold(0, |sum, &digit| sum << 8 | usize::from(digit)), rest)
            }
            // Of no length, or longer than any certificate.
            _ => return None,
        };
        let (content, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((tag, content))
    }

    /// The content of the next element, which has this tag.
    pub(crate) fn expect(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next().filter(|(found, _)| *found == tag).map(|(_, content)| content)
    }

    /// The content of the next element, when it has this tag; else it is left for later.
    pub(crate) fn optional(&mut self, tag: u8) -> Option<&'a [u8]> {
        let mut ahead = *self;
        let content = ahead.expect(tag)?;
        *self = ahead;
        Some(content)
    }
}

/// A time in microseconds since 1970-01-01 UTC; one before that is that.
pub(crate) fn time_us(tag: u8, text: &[u8]) -> Option<u64> {
    let (year_digits, century) = match tag {
        UTC_TIME => (2, 0),
        GENERAL_TIME => (4, 0),
        _ => return None,
    };
    let text = text.strip_suffix(b"Z")?;
    if text.len() != year_digits + 10 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = |at: usize, digits: usize| {
        text[at..at + digits].iter().fold(century, |sum, digit| sum * 10 + i64::from(digit - b'0'))
    };
    let mut year = number(0, year_digits);
    if tag == UTC_TIME {
        year += if year < 50 { 2000 } else { 1900 };
    }
    let part = |index: usize| number(year_digits + 2 * index, 2);
    let (month, day, hour, minute, second) = (part(0), part(1), part(2), part(3), part(4));
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let seconds = ((days(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    Some(u64::try_from(seconds).unwrap_or(0).saturating_mul(1_000_000))
}

/// Days from 1970-01-01 to a day of the Gregorian calendar.
fn days(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March here, so that the leap day is a year's last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (tag, text, seconds) in [
            (UTC_TIME, "700101000000Z", 0),
            (UTC_TIME, "000229235959Z", 951_868_799),
            (UTC_TIME, "491231235959Z", 2_524_607_999),
            (GENERAL_TIME, "20500101000000Z", 2_524_608_000),
            (GENERAL_TIME, "99991231235959Z", 253_402_300_799),
            (UTC_TIME, "500101000000Z", 0),
        ] {
            assert_eq!(time_us(tag, text.as_bytes()), Some(seconds * 1_000_000), "{text}");
        }
        for text in
            ["", "Z", "7001010000Z", "700101000000", "701301000000Z", "70010100000xZ", "700101250000Z"]
        {
            assert_eq!(time_us(UTC_TIME, text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn lengths_beyond_the_end_are_the_end() {
        for bytes in
            [&[0x30][..], &[0x30, 1], &[0x30, 0x80], &[0x30, 0x82, 1], &[0x30, 0x84, 255, 255, 255, 255, 0]]
        {
            assert!(Reader(bytes).next().is_none(), "{bytes:?}");
        }
        let mut reader = Reader(&[0x04, 1, 7, 0x30, 0]);
        assert_eq!(reader.optional(SEQUENCE), None);
        assert_eq!(
            (reader.expect(OCTETS), reader.expect(SEQUENCE), reader.next()),
            (Some(&[7][..]), Some(&[][..]), None)
        );
    }
}
