//! The local disk: a page cache over stable storage. A block is one value; zero is nothing.
//!
//! After a power loss a block holds any one of the values it had since the last flush; a flush makes
//! stable what was there when it began.

/// See the module's description.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LocalDisk {
    /// By block: the values it may hold after a power loss. The first is stable, the last is what a
    /// reader sees.
    blocks: Vec<Vec<u8>>,
}

impl LocalDisk {
    pub(crate) fn new(content: &[u8], blocks: u8) -> Self {
        let value = |block: u8| content.get(usize::from(block)).copied().unwrap_or(0);
        Self { blocks: (0..blocks).map(|block| vec![value(block)]).collect() }
    }

    /// What a reader sees.
    pub(crate) fn value(&self, block: u8) -> u8 {
        *self.blocks[usize::from(block)].last().expect("a block has a value")
    }

    /// The same of all blocks.
    pub(crate) fn values(&self) -> Vec<u8> {
        (0..self.count()).map(|block| self.value(block)).collect()
    }

    pub(crate) fn count(&self) -> u8 {
        u8::try_from(self.blocks.len()).expect("a tiny disk")
    }

    pub(crate) fn write(&mut self, block: u8, value: u8) {
        self.blocks[usize::from(block)].push(value);
    }

    /// What a flush that begins now is going to make stable.
    pub(crate) fn flush_mark(&self) -> Vec<usize> {
        self.blocks.iter().map(|values| values.len() - 1).collect()
    }

    /// What was there at the mark is stable. Other marks move by what is returned.
    pub(crate) fn flush(&mut self, mark: &[usize]) -> Vec<usize> {
        for (values, stable) in self.blocks.iter_mut().zip(mark) {
            values.drain(..stable);
        }
        mark.to_vec()
    }

    /// What a block may hold after a power loss.
    pub(crate) fn possible(&self, block: u8) -> &[u8] {
        &self.blocks[usize::from(block)]
    }

    /// Everything holds these values, stably.
    pub(crate) fn settle(&mut self, values: &[u8]) {
        for (block, value) in self.blocks.iter_mut().zip(values) {
            *block = vec![*value];
        }
    }
}
