//! A node of an image's tree: references to 256 chunks of the level below.

use bytes::{BufMut, Bytes};

use crate::chunk::{ChunkRef, REF_LENGTH};

/// Children of a node.
pub(crate) const FANOUT: usize = 256;

/// How a node's content begins; its last byte is the level.
const MAGIC: [u8; 7] = *b"BKTDNOD";

/// Bytes of a node.
pub(crate) const NODE_LENGTH: usize = 8 + FANOUT * REF_LENGTH;

/// A node. Children that lie beyond the disk's end are zeroes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) level: u8,
    pub(crate) children: Vec<ChunkRef>,
}

impl Node {
    /// One of zeroes only.
    pub(crate) fn zeroes(level: u8) -> Self {
        Self { level, children: vec![ChunkRef::ZEROES; FANOUT] }
    }

    pub(crate) fn is_zeroes(&self) -> bool {
        self.children.iter().all(ChunkRef::is_zeroes)
    }

    pub(crate) fn encode(&self) -> Bytes {
        let mut bytes = Vec::with_capacity(NODE_LENGTH);
        bytes.put_slice(&MAGIC);
        bytes.put_u8(self.level);
        for child in &self.children {
            child.encode(&mut bytes);
        }
        bytes.into()
    }

    /// Reads the bytes back; none for what is no node of this level.
    pub(crate) fn decode(bytes: &[u8], level: u8) -> Option<Self> {
        if bytes.len() != NODE_LENGTH || bytes[..7] != MAGIC || bytes[7] != level {
            return None;
        }
        let children: Option<Vec<_>> = bytes[8..].chunks(REF_LENGTH).map(ChunkRef::decode).collect();
        Some(Self { level, children: children? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_reads_back_at_its_level_only() {
        let mut node = Node::zeroes(2);
        node.children[17] = ChunkRef { hash: [3; 32], pack: 4, ordinal: 5 };
        let bytes = node.encode();
        assert_eq!(Node::decode(&bytes, 2), Some(node));
        assert_eq!(Node::decode(&bytes, 1), None);
        assert_eq!(Node::decode(&bytes[1..], 2), None);
        assert!(Node::zeroes(1).is_zeroes());
    }
}
