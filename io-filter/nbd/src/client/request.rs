//! Requests out.

use backtide_units::ByteRange;
use bytes::{BufMut, BytesMut};

use crate::wire::{command, command_flag, magic};
use crate::{Command, CommandKind, Cookie, ReplyStyle};

/// Appends the header of `request`, framed in `style`; the data of a WRITE has to follow it.
///
/// # Panics
/// When the request is longer than `u32::MAX` without extended headers: the caller splits.
pub fn encode_request(out: &mut BytesMut, style: ReplyStyle, cookie: Cookie, request: &Command) {
    let range = request.range();
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
    let payload = style == ReplyStyle::Extended && kind == CommandKind::Write;
    let flags = flags | flag(payload, command_flag::PAYLOAD_LEN);
    put_header(out, style, Header { flags, kind: number(kind), cookie, range });
}

/// Appends DISC: the server finishes what is in flight and closes.
pub fn encode_disconnect(out: &mut BytesMut, style: ReplyStyle) {
    let (cookie, range) = (Cookie(0), ByteRange::default());
    put_header(out, style, Header { flags: 0, kind: command::DISC, cookie, range });
}

struct Header {
    flags: u16,
    kind: u16,
    cookie: Cookie,
    range: ByteRange,
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

fn put_header(out: &mut BytesMut, style: ReplyStyle, header: Header) {
    let (magic, extended) = match style {
        ReplyStyle::Simple | ReplyStyle::Structured => (magic::REQUEST, false),
        ReplyStyle::Extended => (magic::EXTENDED_REQUEST, true),
    };
    let length = header.range.count().0;
    out.put_u32(magic);
    out.put_u16(header.flags);
    out.put_u16(header.kind);
    out.put_u64(header.cookie.0);
    out.put_u64(header.range.start().0);
    if extended {
        out.put_u64(length);
    } else {
        out.put_u32(u32::try_from(length).expect("requests are split before they are sent"));
    }
}
