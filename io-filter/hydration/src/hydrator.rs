//! What is done for a disk that lacks blocks, in which order: requests that touch something missing, fetches, and
//! what is written down of both.
//!
//! ```text
//!                  ready            done             noted          settled
//! read    waiting ───────▶ image ───────────────────────────────────────────▶ answered
//! change  waiting ───────▶ image ───────▶ noting ───────┬─────────────────────▶ answered
//!                            │ failed        │ failed    └▶ settling (FUA) ────▶ answered
//!                            └───────────────┴────────────────────────────────▶ answered, with that
//! flush                                                     settling ──────────▶ answered
//!
//! fetch   fetching ──brought──▶ storing ──▶ over         a waiting request whose blocks could not be stored is
//!            └──lost──▶ half of it, then the other       answered with that; one whose block is lost as well; a read
//!                                                        whose blocks were stored and not noted is ready
//! ```
//!
//! What the image may hold already is compared and need not be brought, except where something was refused: what can be
//! read there need not be stable, and may never become so.
//!
//! It does no I/O and knows no time: whoever drives it takes [`Step`]s and says how they ended. The agent does so
//! with a real image and a receiver, the simulation with neither.
//!
//! Invariants: the order of `FORMAT.md` - image, journal, answer; and image synced, journal synced, flush answered.
//! When it was [stopped](Hydrator::stop) nothing is stored any more that was not begun before.

mod step;

use std::collections::{BTreeMap, VecDeque};

use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, BlockIndex, BlockRange, ByteCount};

pub use self::step::{Ahead, Refusal, RequestId, Step, Wish};
use crate::{
    ChangeId, FetchId, Missing, Need,
    mutant::{Mutant, Mutation},
};

/// Fetches under way that nobody has asked for, and their blocks. What is scattered takes many small ones.
const AHEAD_MAX: Load = Load { fetches: 16, blocks: 1024 };

/// The same while somebody waits for another.
const AHEAD_MAX_BESIDE_GUEST: Load = Load { fetches: 2, blocks: 256 };

#[derive(Clone, Copy, Debug)]
enum State {
    /// For blocks that are missing.
    Waiting,
    /// The image does it.
    OnImage(Option<ChangeId>),
    /// The journal is told.
    Noting(ChangeId),
    /// It is made durable.
    Settling,
}

/// A fetch under way, and the other halves of what it is a part of.
#[derive(Debug)]
struct Fetch {
    blocks: BlockRange,
    rest: Vec<(FetchId, BlockRange)>,
    /// Blocks that nobody has asked for, at first.
    ahead: Option<BlockCount>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Load {
    fetches: u64,
    blocks: u64,
}

/// See the module's description.
#[derive(Debug)]
pub struct Hydrator {
    missing: Missing,
    next: u64,
    requests: BTreeMap<RequestId, (Wish, State)>,
    fetches: BTreeMap<FetchId, Fetch>,
    steps: VecDeque<Step>,
    /// Where the next run that nobody has asked for is looked for.
    from: BlockIndex,
    stopped: bool,
    failures: u64,
    /// What the image holds of missing blocks may count,
    compares: bool,
    /// except of these, which were written, and it is not sure that they are stable.
    doubted: DirtyBitmap,
    mutation: Mutation,
}

impl Hydrator {
    /// For a disk of `size` that lacks `missing`; `compares`: its image may hold some of that, stably.
    pub fn new(size: ByteCount, missing: DirtyBitmap, compares: bool) -> Self {
        Self {
            missing: Missing::new(size, missing),
            next: 0,
            requests: BTreeMap::new(),
            fetches: BTreeMap::new(),
            steps: VecDeque::new(),
            from: BlockIndex(0),
            stopped: false,
            failures: 0,
            compares,
            doubted: DirtyBitmap::new(),
            mutation: Mutation::default(),
        }
    }

    /// Makes a mistake from now on.
    #[cfg(feature = "mutants")]
    pub fn mutate(&mut self, mutant: Mutant) {
        self.mutation = Mutation::of(mutant);
    }

    /// What is missing.
    pub fn missing(&self) -> &Missing {
        &self.missing
    }

    /// Whether a request has to be [submitted](Self::submit): any other goes straight to the image.
    pub fn needs_care(&self, wish: Wish) -> bool {
        match wish {
            Wish::Read(range) => self.missing.touches(range),
            Wish::Change { range, stable } => stable || self.missing.touches(range),
            Wish::Flush => true,
        }
    }

    /// How many requests wait for missing blocks.
    pub fn waiting(&self) -> u64 {
        self.requests.values().filter(|(_, state)| matches!(state, State::Waiting)).count() as u64
    }

    /// Whether what the image is found to hold of these blocks need not be fetched.
    pub fn may_compare(&self, blocks: BlockRange) -> bool {
        self.compares && (self.mutation.is(Mutant::ComparesAfterRefusal) || !self.doubted.touches(blocks))
    }

    /// How often something could not be stored.
    pub fn store_failures(&self) -> u64 {
        self.failures
    }

    /// Whether a request that the image has overwrites missing blocks.
    pub fn overwrites_missing(&self, id: RequestId) -> bool {
        let state = self.requests.get(&id).map(|(_, state)| *state);
        matches!(state, Some(State::OnImage(Some(change))) if !self.missing.overwritten(change).is_empty())
    }

    /// The next thing to do. Steps are taken until there is none, after every call.
    pub fn next_step(&mut self) -> Option<Step> {
        self.steps.pop_front()
    }

    /// A request begins.
    pub fn submit(&mut self, wish: Wish) -> RequestId {
        self.next += 1;
        let id = RequestId(self.next);
        match wish {
            Wish::Flush => self.settle(id, wish),
            Wish::Read(_) | Wish::Change { .. } => {
                self.requests.insert(id, (wish, State::Waiting));
                self.try_begin(id);
            }
        }
        id
    }

    /// A [`Step::Image`] has ended.
    ///
    /// # Panics
    /// When none of this request was out.
    pub fn image_done(&mut self, id: RequestId, result: Result<(), Refusal>) {
        let (wish, state) = self.request(id);
        let State::OnImage(change) = state else {
            panic!("{id:?} is {state:?}: the image has nothing of it")
        };
        let Some(change) = change else { return self.answer(id, result) };
        let blocks = self.missing.overwritten(change).to_vec();
        let noted = blocks.is_empty() || self.mutation.is(Mutant::NotesFirst);
        match result {
            Ok(()) if self.mutation.is(Mutant::NeverNotes) || noted => {
                self.change_ended(id, wish, change, result)
            }
            Ok(()) => {
                self.requests.insert(id, (wish, State::Noting(change)));
                self.steps.push_back(Step::Note(id, blocks));
            }
            Err(_) => self.change_ended(id, wish, change, result),
        }
    }

    /// A [`Step::Note`] has ended.
    ///
    /// # Panics
    /// When none of this request was out.
    pub fn noted(&mut self, id: RequestId, result: Result<(), Refusal>) {
        let (wish, state) = self.request(id);
        let State::Noting(change) = state else {
            panic!("{id:?} is {state:?}: the journal has nothing of it")
        };
        if self.mutation.is(Mutant::NotesFirst) && result.is_ok() {
            self.requests.insert(id, (wish, State::OnImage(Some(change))));
            return self.steps.push_back(Step::Image(id));
        }
        self.change_ended(id, wish, change, result);
    }

    fn change_ended(&mut self, id: RequestId, wish: Wish, change: ChangeId, result: Result<(), Refusal>) {
        self.missing.end_change(change, result.is_ok());
        let stable = matches!(wish, Wish::Change { stable: true, .. });
        if let (Err(_), Wish::Change { range, .. }) = (result, wish) {
            self.doubted.insert(BlockRange::touched_by(range));
        }
        match result {
            Ok(()) if stable => self.settle(id, wish),
            Ok(()) | Err(_) => self.answer(id, result),
        }
        self.look_again();
    }

    fn settle(&mut self, id: RequestId, wish: Wish) {
        self.requests.insert(id, (wish, State::Settling));
        self.steps.push_back(Step::Settle(id));
    }

    /// A [`Step::Settle`] has ended.
    ///
    /// # Panics
    /// When none of this request was out.
    pub fn settled(&mut self, id: RequestId, result: Result<(), Refusal>) {
        let (_, state) = self.request(id);
        assert!(matches!(state, State::Settling), "{id:?} is {state:?}: nobody settles it");
        if result.is_err() {
            self.missing.doubt_image();
        }
        self.answer(id, result);
    }

    /// A [`Step::Fetch`] has brought its content; `compared`: or the image was found to hold some of it, which counts
    /// only as long as it [may](Self::may_compare).
    ///
    /// # Panics
    /// When it is not under way.
    pub fn fetched(&mut self, id: FetchId, compared: bool) {
        let counts = !compared || self.may_compare(self.fetches[&id].blocks);
        let wanted = self.missing.end_fetch(id, counts && !self.stopped);
        if wanted.is_empty() {
            return self.fetch_over(id);
        }
        let all = vec![self.fetches[&id].blocks];
        let stored = if self.mutation.is(Mutant::StoresOverWrites) { all } else { wanted };
        self.steps.push_back(Step::Store(id, stored));
    }

    /// A [`Step::Fetch`] was dropped, since the disk is given up.
    ///
    /// # Panics
    /// When it is not under way.
    pub fn dropped(&mut self, id: FetchId) {
        self.missing.end_fetch(id, false);
        self.fetch_over(id);
    }

    /// The source has lost something of what a [`Step::Fetch`] asked for; the block, when it is only one. Which of
    /// several is found out by fetching half and half.
    ///
    /// # Panics
    /// When it is not under way.
    pub fn lost(&mut self, id: FetchId) -> Option<BlockIndex> {
        self.missing.end_fetch(id, false);
        let fetch = self.fetches.get_mut(&id).expect("the fetch was begun");
        let blocks = fetch.blocks;
        let found = (blocks.count() == BlockCount(1)).then(|| blocks.start());
        match found {
            Some(block) => self.missing.is_damaged(block),
            None => {
                let middle = BlockIndex(blocks.start().0 + blocks.count().0 / 2);
                for half in
                    [BlockRange::between(middle, blocks.end()), BlockRange::between(blocks.start(), middle)]
                {
                    // Both are under way from now on, so that nobody else asks for them.
                    fetch.rest.push((self.missing.begin_fetch(half), half));
                }
            }
        }
        self.fetch_over(id);
        found
    }

    /// A [`Step::Store`] has ended.
    ///
    /// # Panics
    /// When nothing of this fetch was to be stored.
    pub fn stored(&mut self, id: FetchId, result: Result<(), Refusal>) {
        self.missing.end_store(id, result.is_ok());
        if let Err(refusal) = result {
            let blocks = self.not_stored(id);
            // Before anything is fetched for them once more.
            for request in self.waiting_for(blocks) {
                self.answer(request, Err(refusal));
            }
        }
        self.fetch_over(id);
    }

    /// A [`Step::Store`] has ended: the image has it all, and the journal could not be told. It is missing still, and whoever
    /// reads it reads the image, until that could not be made durable.
    ///
    /// # Panics
    /// As [`stored`](Self::stored).
    pub fn unnoted(&mut self, id: FetchId) {
        self.missing.end_unnoted(id);
        self.not_stored(id);
        self.fetch_over(id);
    }

    fn not_stored(&mut self, id: FetchId) -> BlockRange {
        self.failures += 1;
        let blocks = self.fetches[&id].blocks;
        self.doubted.insert(blocks);
        blocks
    }

    fn waiting_for(&self, blocks: BlockRange) -> Vec<RequestId> {
        let waits = |(_, (wish, state)): &(&RequestId, &(Wish, State))| {
            let range = match wish {
                Wish::Read(range) | Wish::Change { range, .. } => *range,
                Wish::Flush => return false,
            };
            matches!(state, State::Waiting) && BlockRange::touched_by(range).overlaps(blocks)
        };
        self.requests.iter().filter(waits).map(|(id, _)| *id).collect()
    }

    /// A fetch has ended: the next half of what it was a part of, if there is one.
    fn fetch_over(&mut self, id: FetchId) {
        let Fetch { mut rest, ahead, .. } = self.fetches.remove(&id).expect("the fetch was begun");
        if self.stopped {
            for (id, _) in rest {
                self.missing.end_fetch(id, false);
            }
        } else if let Some((id, blocks)) = rest.pop() {
            self.fetches.insert(id, Fetch { blocks, rest, ahead });
            self.steps.push_back(Step::Fetch(id, blocks));
        }
        self.look_again();
    }

    fn begin(&mut self, blocks: BlockRange, ahead: Option<BlockCount>) {
        let id = self.missing.begin_fetch(blocks);
        self.fetches.insert(id, Fetch { blocks, rest: Vec::new(), ahead });
        self.steps.push_back(Step::Fetch(id, blocks));
    }

    /// Begins to fetch something that nobody has asked for, if there is room for it.
    pub fn fetch_ahead(&mut self) -> Ahead {
        if self.missing.is_empty() {
            return Ahead::Complete;
        }
        let most = if self.waiting() > 0 { AHEAD_MAX_BESIDE_GUEST } else { AHEAD_MAX };
        if self.stopped || !self.load().is_below(most) {
            return Ahead::Wait;
        }
        let next = self.missing.next_unfetched(self.from);
        let Some(run) = next.or_else(|| self.missing.next_unfetched(BlockIndex(0))) else {
            return Ahead::Wait;
        };
        self.from = run.end();
        self.begin(run, Some(run.count()));
        Ahead::Begun(run)
    }

    fn load(&self) -> Load {
        let ahead = self.fetches.values().filter_map(|fetch| fetch.ahead);
        ahead.fold(Load::default(), |load, blocks| Load {
            fetches: load.fetches + 1,
            blocks: load.blocks + blocks.0,
        })
    }

    /// The disk is given up: what waits ends with an error, and so does what would have to wait. Fetches that are
    /// out may be dropped.
    pub fn stop(&mut self) {
        self.stopped = true;
        self.look_again();
    }

    fn look_again(&mut self) {
        let waits = |(_, (_, state)): &(&RequestId, &(Wish, State))| matches!(state, State::Waiting);
        let waiting: Vec<RequestId> = self.requests.iter().filter(waits).map(|(id, _)| *id).collect();
        for id in waiting {
            self.try_begin(id);
        }
    }

    /// What it needs is there, or is fetched.
    fn try_begin(&mut self, id: RequestId) {
        let (wish, _) = self.request(id);
        let ready = match wish {
            Wish::Read(range) => self.missing.before_read(range).map_or(Ok(None), Err),
            Wish::Change { range, .. } => self.missing.begin_change(range).map(Some),
            Wish::Flush => unreachable!("a flush waits for no block"),
        };
        match ready {
            Ok(change) => self.go_on(id, wish, change),
            Err(_) if self.stopped => self.answer(id, Err(Refusal::Stopped)),
            Err(Need::Damaged(block)) => self.answer(id, Err(Refusal::Damaged(block))),
            Err(Need::Wait(fetch)) => {
                for blocks in fetch {
                    self.begin(blocks, None);
                }
            }
        }
    }

    fn go_on(&mut self, id: RequestId, wish: Wish, change: Option<ChangeId>) {
        if let Some(change) = change.filter(|_| self.mutation.is(Mutant::NotesFirst)) {
            let blocks = self.missing.overwritten(change).to_vec();
            if !blocks.is_empty() {
                self.requests.insert(id, (wish, State::Noting(change)));
                return self.steps.push_back(Step::Note(id, blocks));
            }
        }
        self.requests.insert(id, (wish, State::OnImage(change)));
        self.steps.push_back(Step::Image(id));
    }

    fn answer(&mut self, id: RequestId, result: Result<(), Refusal>) {
        self.requests.remove(&id).expect("a request is answered once");
        self.steps.push_back(Step::Answer(id, result));
    }

    fn request(&self, id: RequestId) -> (Wish, State) {
        *self.requests.get(&id).unwrap_or_else(|| panic!("{id:?} was answered"))
    }
}

impl Load {
    fn is_below(self, most: Self) -> bool {
        self.fetches < most.fetches && self.blocks < most.blocks
    }
}

#[cfg(test)]
mod tests;
