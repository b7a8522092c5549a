//! The names and times of entries: short names in the letters of old machines, long ones in pieces before them.

/// The letters 0x80 to 0xff of code page 437.
const HIGH: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// Pieces of a long name: 255 letters, 13 in each.
const PIECES_MAX: u8 = 20;

/// Gathers the pieces of a long name until the entry that it belongs to.
#[derive(Default)]
pub(super) struct Reader {
    /// Of the last letters first, as they stand in a directory.
    pieces: Vec<[u16; 13]>,
    /// The number of the piece that was read last.
    number: u8,
    checksum: u8,
}

impl Reader {
    pub(super) fn forget(&mut self) {
        self.pieces.clear();
        self.number = 0;
    }

    /// A piece of a long name; what does not continue the ones before begins anew.
    pub(super) fn add(&mut self, entry: &[u8]) {
        let (number, is_last) = (entry[0] & 0x1f, entry[0] & 0x40 != 0);
        if is_last {
            self.forget();
            (self.number, self.checksum) = (number, entry[13]);
        } else if number.checked_add(1) == Some(self.number) && entry[13] == self.checksum {
            self.number = number;
        } else {
            return self.forget();
        }
        if number == 0 || number > PIECES_MAX {
            return self.forget();
        }
        let mut piece = [0; 13];
        let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain((28..32).step_by(2));
        for (letter, at) in piece.iter_mut().zip(places) {
            *letter = u16::from_le_bytes([entry[at], entry[at + 1]]);
        }
        self.pieces.push(piece);
    }

    /// The name of an entry: the long one when its pieces are whole, else the short one.
    pub(super) fn name(&mut self, entry: &[u8]) -> Vec<u8> {
        let is_whole = self.number == 1 && self.checksum == checksum(&entry[..11]);
        let letters: Vec<u16> = self.pieces.iter().rev().flatten().copied().collect();
        self.forget();
        let end = letters.iter().position(|letter| *letter == 0).unwrap_or(letters.len());
        let long = String::from_utf16_lossy(&letters[..end]);
        if is_whole && !long.is_empty() { long.into_bytes() } else { short(entry).into_bytes() }
    }
}

/// What ties the pieces of a long name to its short one.
fn checksum(short: &[u8]) -> u8 {
    short.iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte))
}

fn short(entry: &[u8]) -> String {
    let part = |bytes: &[u8], is_lower: bool| {
        let letter = |(at, byte): (usize, &u8)| match (at, *byte) {
            // The first byte of what is deleted is 0xe5, so that letter has another number there.
            (0, 0x05) => 'σ',
            (_, byte @ 0x80..) => HIGH.chars().nth(usize::from(byte) - 0x80).unwrap_or('\u{fffd}'),
            (_, byte) if is_lower => char::from(byte).to_ascii_lowercase(),
            (_, byte) => char::from(byte),
        };
        let text: String = bytes.iter().enumerate().map(letter).collect();
        text.trim_end_matches(' ').to_owned()
    };
    let (name, ending) =
        (part(&entry[..8], entry[12] & 0x08 != 0), part(&entry[8..11], entry[12] & 0x10 != 0));
    if ending.is_empty() { name } else { format!("{name}.{ending}") }
}

/// Seconds since 1970 of a date and a time of day, whose zone nobody knows: it is taken for UTC.
pub(super) fn seconds(date: u16, time: u16) -> i64 {
    let (year, month, day) = (1980 + i64::from(date >> 9), i64::from(date >> 5 & 15), i64::from(date & 31));
    let (hour, minute, second) = (i64::from(time >> 11), i64::from(time >> 5 & 63), i64::from(time & 31) * 2);
    if !(1..=12).contains(&month) || day == 0 {
        return 0;
    }
    // Days before the month, of a year that begins with March.
    let (year, month) = if month < 3 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 719_469;
    ((days * 24 + hour) * 60 + minute) * 60 + second
}
