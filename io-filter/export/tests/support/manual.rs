//! An export whose requests wait until the test answers them.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
};

use backtide_export::{Command, CommandKind, Export, ExportInfo, Extent, Reply};
use backtide_units::ByteCount;
use bytes::Bytes;

/// Requests and the replies owed to them, in the order they came.
pub(crate) struct Manual {
    info: ExportInfo,
    waiting: RefCell<VecDeque<(Command, Reply)>>,
    submitted: Cell<usize>,
}

impl Manual {
    pub(crate) fn new(name: &str) -> Rc<Self> {
        Self::with(ExportInfo::new(name, ByteCount(1 << 30)))
    }

    pub(crate) fn with(info: ExportInfo) -> Rc<Self> {
        Rc::new(Self { info, waiting: RefCell::default(), submitted: Cell::new(0) })
    }

    /// How many requests ever came.
    pub(crate) fn submitted(&self) -> usize {
        self.submitted.get()
    }

    /// How many wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.borrow().len()
    }

    /// Takes the oldest request.
    pub(crate) fn take(&self) -> (Command, Reply) {
        self.waiting.borrow_mut().pop_front().expect("a request waits")
    }

    /// Takes the newest request.
    pub(crate) fn take_last(&self) -> (Command, Reply) {
        self.waiting.borrow_mut().pop_back().expect("a request waits")
    }

    /// Answers the oldest request as a disk full of zeroes would.
    pub(crate) fn answer(&self) {
        let (command, reply) = self.take();
        match command.kind() {
            CommandKind::Read => reply.data(Bytes::from(vec![0; command.range().count().0 as usize])),
            CommandKind::BlockStatus => reply.extents(&[Extent::hole(command.range().count())]),
            CommandKind::Write
            | CommandKind::Flush
            | CommandKind::Trim
            | CommandKind::WriteZeroes
            | CommandKind::Cache => reply.done(),
        }
    }

    /// Yields until `count` requests wait.
    pub(crate) async fn until_waiting(&self, count: usize) {
        while self.waiting() < count {
            tokio::task::yield_now().await;
        }
    }
}

impl Export for Manual {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn submit(&self, command: Command, reply: Reply) {
        self.submitted.set(self.submitted.get() + 1);
        self.waiting.borrow_mut().push_back((command, reply));
    }
}
