//! Numbers out of bytes of which nobody has promised that they are there.

/// The bytes end before the field does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Short;

/// `length` bytes from `at` on.
pub(crate) fn part(bytes: &[u8], at: usize, length: usize) -> Result<&[u8], Short> {
    let end = at.checked_add(length).ok_or(Short)?;
    bytes.get(at..end).ok_or(Short)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Short> {
    Ok(part(bytes, at, N)?.try_into().expect("as many bytes as were asked for"))
}

/// A byte.
pub(crate) fn byte(bytes: &[u8], at: usize) -> Result<u8, Short> {
    bytes.get(at).copied().ok_or(Short)
}

macro_rules! numbers {
    ($($name:ident: $number:ty, $from:ident, $what:literal;)*) => {
        $(
            #[doc = $what]
            pub(crate) fn $name(bytes: &[u8], at: usize) -> Result<$number, Short> {
                array(bytes, at).map(<$number>::$from)
            }
        )*
    };
}

numbers! {
    be16: u16, from_be_bytes, "Two bytes, the highest first.";
    be32: u32, from_be_bytes, "Four bytes, the highest first.";
    be64: u64, from_be_bytes, "Eight bytes, the highest first.";
    le16: u16, from_le_bytes, "Two bytes, the lowest first.";
    le32: u32, from_le_bytes, "Four bytes, the lowest first.";
    le64: u64, from_le_bytes, "Eight bytes, the lowest first.";
}

/// A length or position of the volume as an index, when this machine has such.
pub(crate) fn index(number: u64) -> Result<usize, Short> {
    usize::try_from(number).map_err(|_| Short)
}
