//! Compressed files (LZNT1): so many clusters are compressed together, and take fewer.
//!
//! A unit that takes all its clusters is not compressed, one that takes none is zeroes.

use backtide_units::ByteOffset;

use crate::{
    Contents, Error, Source,
    contents::Compressed,
    fields::{byte, le16, part},
};

/// Bytes that are compressed by themselves within a unit.
const CHUNK: usize = 4096;

/// Reads bytes of a compressed file: as many as the buffer takes, fewer at its end only.
pub(super) fn read(
    source: &dyn Source,
    contents: &Contents,
    how: Compressed,
    at: ByteOffset,
    buffer: &mut [u8],
) -> Result<usize, Error> {
    let left = contents.size().0.saturating_sub(at.0);
    let count = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
    let (mut done, size) = (0, how.unit.0);
    while done < count {
        let position = at.0 + done as u64;
        let (start, within) = (position / size * size, (position % size) as usize);
        let bytes = unpack(source, contents, how, ByteOffset(start))?;
        let some = (bytes.len() - within).min(count - done);
        buffer[done..done + some].copy_from_slice(&bytes[within..within + some]);
        done += some;
    }
    Ok(count)
}

/// The unit that begins at `start`.
fn unpack(
    source: &dyn Source,
    contents: &Contents,
    how: Compressed,
    start: ByteOffset,
) -> Result<Vec<u8>, Error> {
    let end = start.0.saturating_add(how.unit.0);
    // A unit is a megabyte at most.
    let size = how.unit.0 as usize;
    let stored = contents.stored(start, ByteOffset(end)).0 as usize;
    if stored == 0 {
        return Ok(vec![0; size]);
    }
    let mut bytes = vec![0; size];
    contents.read_stored(source, start, &mut bytes)?;
    // The last unit may have fewer clusters, and all of them.
    if end.min(how.end.0).saturating_sub(start.0) > stored as u64 {
        let packed = &bytes[..stored];
        let unpacked = decompress(packed, size);
        return unpacked
            .map_err(|error| error.of(|| format!("the compressed unit at byte {start} of a file")));
    }
    Ok(bytes)
}

/// Chunks of a length each, one of which is 0 when there are no more.
fn decompress(packed: &[u8], size: usize) -> Result<Vec<u8>, Error> {
    let (mut out, mut at) = (Vec::with_capacity(size), 0);
    while out.len() < size && at + 2 <= packed.len() {
        let header = le16(packed, at)?;
        if header == 0 {
            break;
        }
        let chunk = part(packed, at + 2, usize::from(header & 0xfff) + 1)?;
        at += 2 + chunk.len();
        let start = out.len();
        if header & 0x8000 == 0 {
            out.extend_from_slice(&chunk[..chunk.len().min(CHUNK)]);
        } else {
            decompress_chunk(chunk, &mut out)?;
        }
        out.resize(start + CHUNK, 0);
    }
    out.resize(size, 0);
    Ok(out)
}

fn decompress_chunk(chunk: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
    let (start, mut at) = (out.len(), 0);
    while at < chunk.len() {
        let flags = byte(chunk, at)?;
        at += 1;
        for bit in 0..8 {
            if at >= chunk.len() {
                break;
            }
            let position = out.len() - start;
            if flags >> bit & 1 == 0 {
                out.push(byte(chunk, at)?);
                at += 1;
            } else {
                let token = usize::from(le16(chunk, at)?);
                at += 2;
                // The further on, the more bits say how far back.
                let back_bits = (position.saturating_sub(1).max(1).ilog2() + 1).clamp(4, 12);
                let (back, length) =
                    ((token >> (16 - back_bits)) + 1, (token & ((1 << (16 - back_bits)) - 1)) + 3);
                if back > position || position + length > CHUNK {
                    return Err(Error::damaged("", "it refers to what is not there"));
                }
                for from in out.len() - back..out.len() - back + length {
                    out.push(out[from]);
                }
            }
            if out.len() - start > CHUNK {
                return Err(Error::damaged("", "a part of it is too long"));
            }
        }
    }
    Ok(())
}
