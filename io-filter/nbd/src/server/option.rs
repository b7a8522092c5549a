//! The answers to the handshake's options, one function each.
//!
//! Each appends its replies and the final ACK, or returns a [`Refusal`] that becomes an error
//! reply; the handshake goes on after either.

use std::borrow::Cow;

use bytes::{Buf, BufMut, BytesMut};

use super::handshake::{Catalog, Contexts, Session, TlsMode};
use crate::wire::{self, base_allocation, dirty_bitmap, info, magic, option_reply};
use crate::{BlockSizes, ExportInfo, ReplyStyle};

/// The id `base:allocation` has on every connection.
pub(super) const BASE_ALLOCATION_ID: u32 = 1;

/// The id an export's dirty bitmap has on every connection.
pub(super) const DIRTY_BITMAP_ID: u32 = 2;

/// An error reply to an option.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) reply: u32,
    pub(super) text: Cow<'static, str>,
}

impl Refusal {
    fn new(reply: u32, text: impl Into<Cow<'static, str>>) -> Self {
        Self { reply, text: text.into() }
    }

    pub(super) fn unsupported(text: impl Into<Cow<'static, str>>) -> Self {
        Self::new(option_reply::ERR_UNSUP, text)
    }

    fn invalid(text: &'static str) -> Self {
        Self::new(option_reply::ERR_INVALID, text)
    }

    pub(super) fn policy(text: &'static str) -> Self {
        Self::new(option_reply::ERR_POLICY, text)
    }

    pub(super) fn too_big(text: impl Into<Cow<'static, str>>) -> Self {
        Self::new(option_reply::ERR_TOO_BIG, text)
    }

    pub(super) fn shutdown() -> Self {
        Self::new(option_reply::ERR_SHUTDOWN, "the server is shutting down")
    }

    pub(super) fn tls_required() -> Self {
        Self::new(option_reply::ERR_TLS_REQD, "begin with STARTTLS")
    }

    fn unknown_export(name: &str) -> Self {
        let text = match name {
            "" => "there is no default export: name one, LIST tells which there are".to_owned(),
            name => format!("there is no export {name:?}"),
        };
        Self::new(option_reply::ERR_UNKNOWN, text)
    }
}

/// What the options have settled so far.
#[derive(Debug, Default)]
pub(super) struct Options {
    style: ReplyStyle,
    /// What SET_META_CONTEXT chose, and for which export, by the name the client used.
    chosen: Option<(String, Contexts)>,
}

/// LIST: one reply per export.
pub(super) fn list(data: &[u8], catalog: &dyn Catalog, out: &mut BytesMut) -> Result<(), Refusal> {
    if !data.is_empty() {
        return Err(Refusal::invalid("LIST takes no data"));
    }
    for export in catalog.list() {
        let mut entry = BytesMut::new();
        let name = cut(&export.name);
        entry.put_u32(name.len() as u32);
        entry.put_slice(name);
        entry.put_slice(cut(&export.description));
        put_reply(out, wire::option::LIST, option_reply::SERVER, &entry);
    }
    put_reply(out, wire::option::LIST, option_reply::ACK, &[]);
    Ok(())
}

/// STARTTLS: the acknowledgement is the last that is sent in the clear.
pub(super) fn start_tls(tls: TlsMode, secured: bool, data: &[u8], out: &mut BytesMut) -> Result<(), Refusal> {
    if tls == TlsMode::Off {
        return Err(Refusal::policy("TLS is not configured here"));
    }
    if secured {
        return Err(Refusal::invalid("TLS was started already"));
    }
    if !data.is_empty() {
        return Err(Refusal::invalid("STARTTLS takes no data"));
    }
    put_reply(out, wire::option::STARTTLS, option_reply::ACK, &[]);
    Ok(())
}

impl Options {
    /// What transmission on `export` will be like.
    pub(super) fn session(&self, requested: &str, export: ExportInfo) -> Session {
        let chosen = self.chosen.as_ref().filter(|(export, _)| export == requested);
        let chosen = chosen.map_or_else(Contexts::default, |(_, contexts)| *contexts);
        // The export may have been described anew since they were chosen.
        let served = self.style != ReplyStyle::Simple && export.block_status;
        let contexts = Contexts {
            base_allocation: served && chosen.base_allocation,
            dirty_bitmap: served && chosen.dirty_bitmap && export.dirty_bitmap.is_some(),
        };
        Session { requested: requested.to_owned(), export, style: self.style, contexts }
    }

    /// INFO and GO: describes the export.
    pub(super) fn describe(
        &self,
        option: u32,
        mut data: &[u8],
        catalog: &dyn Catalog,
        out: &mut BytesMut,
    ) -> Result<Session, Refusal> {
        let name = take_string(&mut data)?;
        let count = data.try_get_u16().map_err(|_| Refusal::invalid("data is cut off"))?;
        if data.len() != usize::from(count) * 2 {
            return Err(Refusal::invalid("information requests do not match their count"));
        }
        let wanted = |kind: u16| data.chunks_exact(2).any(|request| request == kind.to_be_bytes());
        let export = catalog.find(name).ok_or_else(|| Refusal::unknown_export(name))?;
        let sizes = export.block_sizes;
        assert!(sizes.are_valid(), "block sizes of an export: {sizes:?}");
        let mut body = BytesMut::new();
        if sizes.minimum > 1 && !export.serves_any_range && !wanted(info::BLOCK_SIZE) {
            // Told along with the refusal, so that the client need not ask.
            put_block_sizes(out, option, sizes, &mut body);
            let text = format!("the block size is {} bytes, ask for it", sizes.minimum);
            return Err(Refusal::new(option_reply::ERR_BLOCK_SIZE_REQD, text));
        }

        let session = self.session(name, export);
        let export = &session.export;
        body.clear();
        body.put_u16(info::EXPORT);
        body.put_u64(export.size.0);
        body.put_u16(export.transmission_flags(session.style, session.contexts.any()).0);
        put_reply(out, option, option_reply::INFO, &body);
        for (kind, text) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
            if wanted(kind) && (kind == info::NAME || !text.is_empty()) {
                body.clear();
                body.put_u16(kind);
                body.put_slice(cut(text));
                put_reply(out, option, option_reply::INFO, &body);
            }
        }
        put_block_sizes(out, option, sizes, &mut body);
        put_reply(out, option, option_reply::ACK, &[]);
        Ok(session)
    }

    /// STRUCTURED_REPLY.
    pub(super) fn structured_reply(&mut self, data: &[u8], out: &mut BytesMut) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err(Refusal::invalid("STRUCTURED_REPLY takes no data"));
        }
        if self.style == ReplyStyle::Extended {
            let text = "extended headers were chosen already";
            return Err(Refusal::new(option_reply::ERR_EXT_HEADER_REQD, text));
        }
        self.style = ReplyStyle::Structured;
        put_reply(out, wire::option::STRUCTURED_REPLY, option_reply::ACK, &[]);
        Ok(())
    }

    /// EXTENDED_HEADERS; takes precedence over structured replies.
    pub(super) fn extended_headers(&mut self, data: &[u8], out: &mut BytesMut) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err(Refusal::invalid("EXTENDED_HEADERS takes no data"));
        }
        self.style = ReplyStyle::Extended;
        put_reply(out, wire::option::EXTENDED_HEADERS, option_reply::ACK, &[]);
        Ok(())
    }

    /// How messages will be framed.
    pub(super) fn style(&self) -> ReplyStyle {
        self.style
    }

    /// LIST_META_CONTEXT.
    pub(super) fn list_contexts(
        &self,
        data: &[u8],
        catalog: &dyn Catalog,
        out: &mut BytesMut,
    ) -> Result<(), Refusal> {
        let queries = self.context_queries(data, catalog)?;
        // No query at all asks for everything; a bare namespace for everything in it.
        let all = queries.total == 0;
        let contexts = Contexts {
            base_allocation: all || queries.listed.base_allocation,
            dirty_bitmap: all || queries.listed.dirty_bitmap,
        };
        put_contexts(out, wire::option::LIST_META_CONTEXT, &queries, contexts, [0, 0]);
        put_reply(out, wire::option::LIST_META_CONTEXT, option_reply::ACK, &[]);
        Ok(())
    }

    /// SET_META_CONTEXT; replaces an earlier choice, also when it fails.
    pub(super) fn set_contexts(
        &mut self,
        data: &[u8],
        catalog: &dyn Catalog,
        out: &mut BytesMut,
    ) -> Result<(), Refusal> {
        self.chosen = None;
        let queries = self.context_queries(data, catalog)?;
        let ids = [BASE_ALLOCATION_ID, DIRTY_BITMAP_ID];
        let contexts = put_contexts(out, wire::option::SET_META_CONTEXT, &queries, queries.exact, ids);
        self.chosen = contexts.any().then_some((queries.export, contexts));
        put_reply(out, wire::option::SET_META_CONTEXT, option_reply::ACK, &[]);
        Ok(())
    }

    /// A SET_META_CONTEXT was refused before it was read.
    pub(super) fn forget_contexts(&mut self) {
        self.chosen = None;
    }

    fn context_queries(&self, mut data: &[u8], catalog: &dyn Catalog) -> Result<Queries, Refusal> {
        if self.style == ReplyStyle::Simple {
            return Err(Refusal::invalid("metadata contexts need structured replies first"));
        }
        let export = take_string(&mut data)?;
        let total = data.try_get_u32().map_err(|_| Refusal::invalid("data is cut off"))?;
        let found = catalog.find(export).ok_or_else(|| Refusal::unknown_export(export))?;
        let dirty = found.dirty_bitmap.map(|name| format!("{}{name}", dirty_bitmap::PREFIX));
        let (mut exact, mut listed) = (Contexts::default(), Contexts::default());
        // Each query takes four bytes at least, so the count cannot outlast the data.
        for _ in 0..total {
            let query = take_string(&mut data)?;
            exact.base_allocation |= query == base_allocation::NAME;
            exact.dirty_bitmap |= dirty.as_deref() == Some(query);
            listed.base_allocation |= query == "base:";
            listed.dirty_bitmap |= query == dirty_bitmap::NAMESPACE || query == dirty_bitmap::PREFIX;
        }
        listed.base_allocation |= exact.base_allocation;
        listed.dirty_bitmap |= exact.dirty_bitmap;
        if !data.is_empty() {
            return Err(Refusal::invalid("data after the last query"));
        }
        let block_status = found.block_status;
        Ok(Queries { export: export.to_owned(), block_status, dirty, total, exact, listed })
    }
}

struct Queries {
    export: String,
    block_status: bool,
    /// The full name of the export's dirty bitmap.
    dirty: Option<String>,
    total: u32,
    /// Asked for by name.
    exact: Contexts,
    /// Asked for by name or namespace.
    listed: Contexts,
}

/// Which export an option is about, if it is about one and says so as it should.
pub(super) fn export_of(code: u32, mut data: &[u8]) -> Option<&str> {
    use wire::option::{EXPORT_NAME, GO, INFO, LIST_META_CONTEXT, SET_META_CONTEXT};
    match code {
        EXPORT_NAME => std::str::from_utf8(data).ok(),
        INFO | GO | LIST_META_CONTEXT | SET_META_CONTEXT => take_string(&mut data).ok(),
        _ => None,
    }
}

/// Takes a string with its length in front.
fn take_string<'data>(data: &mut &'data [u8]) -> Result<&'data str, Refusal> {
    let length = data.try_get_u32().map_err(|_| Refusal::invalid("data is cut off"))? as usize;
    let (string, rest) = data.split_at_checked(length).ok_or_else(|| Refusal::invalid("data is cut off"))?;
    if length > wire::MAX_STRING {
        return Err(Refusal::too_big("a string is longer than 4096 bytes"));
    }
    *data = rest;
    if string.contains(&0) {
        return Err(Refusal::invalid("a string contains NUL"));
    }
    std::str::from_utf8(string).map_err(|_| Refusal::invalid("a string is not UTF-8"))
}

fn put_block_sizes(out: &mut BytesMut, option: u32, sizes: BlockSizes, body: &mut BytesMut) {
    body.clear();
    body.put_u16(info::BLOCK_SIZE);
    body.put_u32(sizes.minimum);
    body.put_u32(sizes.preferred);
    body.put_u32(sizes.maximum);
    put_reply(out, option, option_reply::INFO, body);
}

/// Appends those of `wanted` that the export has, and gives them.
fn put_contexts(
    out: &mut BytesMut,
    option: u32,
    queries: &Queries,
    wanted: Contexts,
    [base_id, dirty_id]: [u32; 2],
) -> Contexts {
    let mut put = |id: u32, name: &str| {
        let mut body = BytesMut::new();
        body.put_u32(id);
        body.put_slice(name.as_bytes());
        put_reply(out, option, option_reply::META_CONTEXT, &body);
    };
    let mut contexts = Contexts::default();
    if queries.block_status && wanted.base_allocation {
        put(base_id, base_allocation::NAME);
        contexts.base_allocation = true;
    }
    if let Some(name) = queries.dirty.as_ref().filter(|_| queries.block_status && wanted.dirty_bitmap) {
        put(dirty_id, name);
        contexts.dirty_bitmap = true;
    }
    contexts
}

/// Appends one answer to an option.
pub(super) fn put_reply(out: &mut BytesMut, option: u32, reply: u32, data: &[u8]) {
    out.put_u64(magic::OPTION_REPLY);
    out.put_u32(option);
    out.put_u32(reply);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
}

/// Appends a refusal of an option.
pub(super) fn put_refusal(out: &mut BytesMut, option: u32, refusal: &Refusal) {
    put_reply(out, option, refusal.reply, cut(&refusal.text));
}

/// A text no longer than the specification allows.
pub(super) fn cut(text: &str) -> &[u8] {
    &text.as_bytes()[..text.floor_char_boundary(wire::MAX_STRING)]
}
