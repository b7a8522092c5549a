//! Requests out.

use bytes::{BufMut, BytesMut};

use crate::wire::{command, command_flag, magic};
use crate::{Command, CommandKind, Cookie};

/// Appends the header of `request`; the data of a WRITE has to follow it.
///
/// # Panics
/// When the request is longer than `u32::MAX`: the caller splits.
pub fn encode_request(out: &mut BytesMut, cookie: Cookie, request: &Command) {
    let range = request.range();
    let length = u32::try_from(range.count().0).expect("requests are split before they are sent");
    let (kind, flags) = match request {
        Command::Read { one_chunk, .. } => (CommandKind::Read, flag(*one_chunk, command_flag::DF)),
        Command::Write { fua, .. } => (CommandKind::Write, flag(*fua, command_flag::FUA)),
        Command::Flush => (CommandKind::Flush, 0),
        Command::Trim { fua, .. } => (CommandKind::Trim, flag(*fua, command_flag::FUA)),
        Command::WriteZeroes { fua, no_hole, fast, .. } => (
            CommandKind::WriteZeroes,
            flag(*fua, command_flag::FUA)
                | flag(*no_hole, command_flag::NO_HOLE)
                | flag(*fast, command_flag::FAST_ZERO),
        ),
        Command::Cache { .. } => (CommandKind::Cache, 0),
        Command::BlockStatus { one, .. } => (CommandKind::BlockStatus, flag(*one, command_flag::REQ_ONE)),
    };
    put_header(out, flags, number(kind), cookie, range.start().0, length);
}

/// Appends DISC: the server finishes what is in flight and closes.
pub fn encode_disconnect(out: &mut BytesMut) {
    put_header(out, 0, command::DISC, Cookie(0), 0, 0);
}

fn number(kind: CommandKind) -> u16 {
    match kind {
        CommandKind::Read => command::READ,
        CommandKind::Write => command::WRITE,
        CommandKind::Flush => command::FLUSH,
        CommandKind::Trim => command::TRIM,
        CommandKind::WriteZeroes => command::WRITE_ZEROES,
        CommandKind::Cache => command::CACHE,
        CommandKind::BlockStatus => command::BLOCK_STATUS,
    }
}

fn flag(set: bool, bit: u16) -> u16 {
    if set { bit } else { 0 }
}

fn put_header(out: &mut BytesMut, flags: u16, kind: u16, cookie: Cookie, offset: u64, length: u32) {
    out.put_u32(magic::REQUEST);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie.0);
    out.put_u64(offset);
    out.put_u32(length);
}
