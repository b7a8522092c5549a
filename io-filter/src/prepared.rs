//! What a resync or a verify makes of what it reads: checksums to send it with, or hashes to ask with.
//! That takes long enough to be done where the bytes are read, on a thread that no guest waits for and
//! whose processor still has them in its cache.

use backtide_protocol::{CompareItem, Data};
use backtide_units::{ByteRange, is_zeroes};
use bytes::Bytes;

use crate::{compare::chunk_items, event::LocalData, filter::Filter};

/// What is done with what is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadUse {
    /// It is sent.
    Send,
    /// The receiver is asked whether it has the same.
    Compare,
}

/// Bytes that were read, and what was made of them for their use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    bytes: Bytes,
    made: Made,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Made {
    /// What is sent: nothing when all bytes are zeroes.
    Data(Data),
    /// Of this range.
    Items(ByteRange, Vec<CompareItem>),
}

impl Prepared {
    /// Looks through the bytes of `range`, which were just read.
    pub fn new(wanted: ReadUse, range: ByteRange, bytes: Bytes) -> Self {
        let made = match wanted {
            ReadUse::Send => {
                let sent = if is_zeroes(&bytes) { Bytes::new() } else { bytes.clone() };
                Made::Data(Data::capture(sent))
            }
            ReadUse::Compare => Made::Items(range, chunk_items(range, &bytes)),
        };
        Self { bytes, made }
    }
}

impl LocalData {
    /// What a read brought.
    ///
    /// # Panics
    /// When it was no read.
    pub(crate) fn read(self) -> Bytes {
        match self {
            Self::Read(bytes) | Self::Prepared(Prepared { bytes, .. }) => bytes,
            Self::Changed => unreachable!("a read brings bytes"),
        }
    }

    /// The same, and what is sent of it if that was made.
    ///
    /// # Panics
    /// When it was no read.
    pub(crate) fn read_to_send(self) -> (Bytes, Option<Data>) {
        match self {
            Self::Prepared(Prepared { bytes, made: Made::Data(data) }) => (bytes, Some(data)),
            read => (read.read(), None),
        }
    }

    /// What a read of `range` brought, and how it is asked about; that is made now unless it was.
    ///
    /// # Panics
    /// When it was no read.
    pub(crate) fn read_to_compare(self, range: ByteRange) -> (Bytes, Vec<CompareItem>) {
        match self {
            Self::Prepared(Prepared { bytes, made: Made::Items(of, items) }) if of == range => (bytes, items),
            read => {
                let bytes = read.read();
                let items = chunk_items(range, &bytes);
                (bytes, items)
            }
        }
    }
}

impl Filter {
    /// What is done with what a resync or a verify reads now, so that its reads may end as
    /// [`LocalData::Prepared`]; none while nothing reads. The use may be another one when a read ends:
    /// what was made for it is then of none.
    pub fn read_use(&self) -> Option<ReadUse> {
        match &self.pass {
            Some(pass) if pass.compare => Some(ReadUse::Compare),
            Some(_) => Some(ReadUse::Send),
            None => self.is_verifying().then_some(ReadUse::Compare),
        }
    }
}

#[cfg(test)]
mod tests {
    use backtide_units::ByteOffset;

    use super::*;

    #[test]
    fn what_was_made_for_another_use_is_made_anew() {
        let range = ByteRange::between(ByteOffset(60 << 10), ByteOffset(196 << 10));
        let mut content = vec![7; 136 << 10];
        content[4096..68 << 10].fill(0);
        let bytes = Bytes::from(content);
        let items = chunk_items(range, &bytes);
        assert_eq!(items.len(), 4, "no chunk crosses a multiple of 64 KiB");
        let prepared = |wanted| LocalData::Prepared(Prepared::new(wanted, range, bytes.clone()));
        for read in [LocalData::Read(bytes.clone()), prepared(ReadUse::Send), prepared(ReadUse::Compare)] {
            assert_eq!(read.clone().read(), bytes);
            assert_eq!(read.read_to_compare(range), (bytes.clone(), items.clone()));
        }
        assert_eq!(prepared(ReadUse::Compare).read_to_send(), (bytes.clone(), None));
        assert_eq!(prepared(ReadUse::Send).read_to_send(), (bytes.clone(), Some(Data::capture(bytes))));
    }
}
