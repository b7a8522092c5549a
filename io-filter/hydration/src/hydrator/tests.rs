use backtide_units::{ByteOffset, ByteRange};

use super::*;

const BLOCK: u64 = 4096;

/// A disk of 600 blocks, all missing but the first ten.
fn hydrator() -> Hydrator {
    Hydrator::new(ByteCount(600 * BLOCK), DirtyBitmap::of((10..600).into()), true)
}

fn bytes(start: u64, end: u64) -> ByteRange {
    ByteRange::between(ByteOffset(start), ByteOffset(end))
}

fn blocks(start: u64, end: u64) -> ByteRange {
    bytes(start * BLOCK, end * BLOCK)
}

fn write(range: ByteRange) -> Wish {
    Wish::Change { range, stable: false }
}

fn steps(hydrator: &mut Hydrator) -> Vec<Step> {
    std::iter::from_fn(|| hydrator.next_step()).collect()
}

fn only(hydrator: &mut Hydrator) -> Step {
    let mut steps = steps(hydrator);
    assert_eq!(steps.len(), 1, "{steps:?}");
    steps.remove(0)
}

/// The one fetch that is begun.
fn fetch(hydrator: &mut Hydrator) -> (FetchId, BlockRange) {
    match only(hydrator) {
        Step::Fetch(id, blocks) => (id, blocks),
        other => panic!("{other:?}"),
    }
}

const EIO: Refusal = Refusal::Failed { errno: 5 };

#[test]
fn a_read_waits_until_what_is_around_it_was_stored() {
    let mut hydrator = hydrator();
    assert!(
        !hydrator.needs_care(Wish::Read(blocks(0, 10))) && hydrator.needs_care(Wish::Read(blocks(9, 11)))
    );
    let read = hydrator.submit(Wish::Read(blocks(40, 41)));
    let (id, wanted) = fetch(&mut hydrator);
    assert_eq!((wanted, hydrator.waiting()), ((32..48).into(), 1));
    hydrator.fetched(id, false);
    assert_eq!(only(&mut hydrator), Step::Store(id, vec![wanted]));
    hydrator.stored(id, Ok(()));
    assert_eq!((only(&mut hydrator), hydrator.waiting()), (Step::Image(read), 0));
    hydrator.image_done(read, Ok(()));
    assert_eq!(only(&mut hydrator), Step::Answer(read, Ok(())));
    assert!(!hydrator.needs_care(write(blocks(32, 48))));
}

#[test]
fn a_change_is_on_the_image_then_in_the_journal_then_stable_then_answered() {
    let mut hydrator = hydrator();
    let change = hydrator.submit(Wish::Change { range: blocks(20, 22), stable: true });
    assert_eq!(only(&mut hydrator), Step::Image(change));
    hydrator.image_done(change, Ok(()));
    assert_eq!(only(&mut hydrator), Step::Note(change, vec![(20..22).into()]));
    assert!(hydrator.missing().touches(blocks(20, 22)), "the journal does not know yet");
    hydrator.noted(change, Ok(()));
    assert!(!hydrator.missing().touches(blocks(20, 22)));
    assert_eq!(only(&mut hydrator), Step::Settle(change));
    hydrator.settled(change, Ok(()));
    assert_eq!(only(&mut hydrator), Step::Answer(change, Ok(())));
}

#[test]
fn a_change_of_part_of_a_block_waits_for_the_rest_of_it() {
    let mut hydrator = hydrator();
    let change = hydrator.submit(write(bytes(20 * BLOCK + 1, 22 * BLOCK)));
    let (id, wanted) = fetch(&mut hydrator);
    assert_eq!(wanted, (16..32).into());
    hydrator.fetched(id, false);
    only(&mut hydrator);
    hydrator.stored(id, Ok(()));
    assert_eq!(only(&mut hydrator), Step::Image(change));
    hydrator.image_done(change, Ok(()));
    assert_eq!(only(&mut hydrator), Step::Answer(change, Ok(())), "nothing missing was overwritten");
}

#[test]
fn what_fails_on_the_image_or_in_the_journal_is_missing_still() {
    let mut hydrator = hydrator();
    for in_journal in [false, true] {
        let change = hydrator.submit(write(blocks(20, 21)));
        assert_eq!(only(&mut hydrator), Step::Image(change));
        if in_journal {
            hydrator.image_done(change, Ok(()));
            assert_eq!(only(&mut hydrator), Step::Note(change, vec![(20..21).into()]));
            hydrator.noted(change, Err(EIO));
        } else {
            hydrator.image_done(change, Err(EIO));
        }
        assert_eq!(only(&mut hydrator), Step::Answer(change, Err(EIO)));
        assert!(hydrator.missing().touches(blocks(20, 21)));
    }
}

#[test]
fn what_a_guest_writes_meanwhile_is_not_stored() {
    let mut hydrator = hydrator();
    let read = hydrator.submit(Wish::Read(blocks(20, 21)));
    let (id, _) = fetch(&mut hydrator);
    let change = hydrator.submit(write(blocks(20, 22)));
    assert_eq!(only(&mut hydrator), Step::Image(change));
    hydrator.fetched(id, false);
    assert_eq!(only(&mut hydrator), Step::Store(id, vec![(16..20).into(), (22..32).into()]));
    hydrator.image_done(change, Ok(()));
    only(&mut hydrator);
    hydrator.noted(change, Ok(()));
    assert_eq!(steps(&mut hydrator), [Step::Answer(change, Ok(())), Step::Image(read)]);
}

#[test]
fn what_is_lost_is_found_out_by_halves_and_the_rest_comes() {
    let mut hydrator = hydrator();
    let read = hydrator.submit(Wish::Read(blocks(12, 13)));
    let mut brought = Vec::new();
    let mut lost = Vec::new();
    let mut answered = None;
    while answered.is_none() || brought.len() < 3 {
        match only(&mut hydrator) {
            Step::Fetch(id, run) if run.start() <= BlockIndex(12) && run.end() > BlockIndex(12) => {
                lost.extend(hydrator.lost(id));
            }
            Step::Fetch(id, run) => {
                brought.push(run);
                hydrator.fetched(id, false);
                assert_eq!(only(&mut hydrator), Step::Store(id, vec![run]));
                hydrator.stored(id, Ok(()));
            }
            other => panic!("{other:?}"),
        }
        // Whoever waits for the lost block hears at once.
        if lost == [BlockIndex(12)] && answered.is_none() {
            let step = hydrator.steps.iter().position(|step| matches!(step, Step::Answer(..)));
            answered = hydrator.steps.remove(step.expect("it is answered"));
        }
    }
    assert_eq!(answered, Some(Step::Answer(read, Err(Refusal::Damaged(BlockIndex(12))))));
    assert_eq!(steps(&mut hydrator), []);
    assert_eq!(brought, [(10..11).into(), (11..12).into(), (13..16).into()]);
    assert!(hydrator.missing().damaged().contains((12..13).into()));
    // It can be overwritten.
    let change = hydrator.submit(write(blocks(12, 13)));
    assert_eq!(only(&mut hydrator), Step::Image(change));
}

#[test]
fn what_cannot_be_stored_is_a_failure_of_those_who_wait_for_it() {
    let mut hydrator = hydrator();
    let read = hydrator.submit(Wish::Read(blocks(40, 41)));
    let (id, _) = fetch(&mut hydrator);
    let other = hydrator.submit(Wish::Read(blocks(80, 81)));
    fetch(&mut hydrator);
    hydrator.fetched(id, false);
    only(&mut hydrator);
    hydrator.stored(id, Err(EIO));
    assert_eq!(only(&mut hydrator), Step::Answer(read, Err(EIO)));
    assert_eq!((hydrator.store_failures(), hydrator.waiting()), (1, 1), "{other:?} waits");
    // It is tried again for whoever asks again.
    hydrator.submit(Wish::Read(blocks(40, 41)));
    assert_eq!(fetch(&mut hydrator).1, (32..48).into());
}

#[test]
fn what_is_stored_and_cannot_be_noted_is_read_and_is_missing_still() {
    let mut hydrator = hydrator();
    let reads = [40, 41].map(|block| hydrator.submit(Wish::Read(blocks(block, block + 1))));
    let part = hydrator.submit(write(bytes(42 * BLOCK + 1, 44 * BLOCK)));
    let (id, wanted) = fetch(&mut hydrator);
    hydrator.fetched(id, false);
    assert_eq!(only(&mut hydrator), Step::Store(id, vec![wanted]));
    hydrator.unnoted(id);
    assert_eq!(steps(&mut hydrator), [Step::Image(reads[0]), Step::Image(reads[1]), Step::Image(part)]);
    for read in reads {
        hydrator.image_done(read, Ok(()));
        assert_eq!(only(&mut hydrator), Step::Answer(read, Ok(())));
    }
    assert_eq!((hydrator.store_failures(), hydrator.missing().touches(blocks(32, 48))), (1, true));
    // What is written of it is noted with the rest of its blocks, or not at all.
    let waits = hydrator.submit(Wish::Read(blocks(42, 43)));
    assert_eq!(steps(&mut hydrator), [], "{waits:?}");
    hydrator.image_done(part, Ok(()));
    assert_eq!(only(&mut hydrator), Step::Note(part, vec![(42..44).into()]));
    hydrator.noted(part, Err(EIO));
    let after = steps(&mut hydrator);
    let [Step::Answer(id, Err(EIO)), Step::Fetch(again, run)] = after[..] else { panic!("{after:?}") };
    assert_eq!((id, run), (part, (42..44).into()), "nobody was told that it is written");
    hydrator.fetched(again, false);
    assert_eq!(only(&mut hydrator), Step::Store(again, vec![run]));
    hydrator.unnoted(again);
    assert_eq!(only(&mut hydrator), Step::Image(waits));
    // There is room again.
    let all = hydrator.submit(write(bytes(32 * BLOCK + 1, 48 * BLOCK - 1)));
    assert_eq!(only(&mut hydrator), Step::Image(all));
    hydrator.image_done(all, Ok(()));
    assert_eq!(only(&mut hydrator), Step::Note(all, vec![(32..48).into()]));
    hydrator.noted(all, Ok(()));
    assert!(!hydrator.missing().touches(blocks(32, 48)));
    assert_eq!(only(&mut hydrator), Step::Answer(all, Ok(())));
}

#[test]
fn what_is_stored_and_not_noted_is_fetched_again_after_a_flush_that_failed() {
    let mut hydrator = hydrator();
    for flush_fails in [false, true] {
        let read = hydrator.submit(Wish::Read(blocks(40, 41)));
        match flush_fails {
            false => {
                let (id, run) = fetch(&mut hydrator);
                hydrator.fetched(id, false);
                assert_eq!(only(&mut hydrator), Step::Store(id, vec![run]));
                hydrator.unnoted(id);
                assert_eq!(only(&mut hydrator), Step::Image(read));
            }
            true => assert_eq!(only(&mut hydrator), Step::Image(read)),
        }
        let flush = hydrator.submit(Wish::Flush);
        assert_eq!(only(&mut hydrator), Step::Settle(flush));
        let settled = if flush_fails { Err(EIO) } else { Ok(()) };
        hydrator.settled(flush, settled);
        assert_eq!(only(&mut hydrator), Step::Answer(flush, settled));
    }
    let again = hydrator.submit(Wish::Read(blocks(40, 41)));
    let (id, run) = fetch(&mut hydrator);
    hydrator.fetched(id, false);
    assert_eq!(only(&mut hydrator), Step::Store(id, vec![run]));
    hydrator.stored(id, Err(EIO));
    assert_eq!(only(&mut hydrator), Step::Answer(again, Err(EIO)));
}

#[test]
fn a_disk_given_up_stores_nothing_and_lets_nobody_wait() {
    let mut hydrator = hydrator();
    let read = hydrator.submit(Wish::Read(blocks(40, 41)));
    let (id, _) = fetch(&mut hydrator);
    let (dropped, _) = match hydrator.fetch_ahead() {
        Ahead::Begun(_) => fetch(&mut hydrator),
        other => panic!("{other:?}"),
    };
    hydrator.stop();
    assert_eq!(only(&mut hydrator), Step::Answer(read, Err(Refusal::Stopped)));
    hydrator.fetched(id, false);
    hydrator.dropped(dropped);
    assert_eq!((steps(&mut hydrator), hydrator.fetch_ahead()), (vec![], Ahead::Wait));
    // What needs nothing goes on.
    let change = hydrator.submit(write(blocks(40, 41)));
    let late = hydrator.submit(Wish::Read(blocks(50, 51)));
    assert_eq!(steps(&mut hydrator), [Step::Image(change), Step::Answer(late, Err(Refusal::Stopped))]);
    let flush = hydrator.submit(Wish::Flush);
    assert_eq!(only(&mut hydrator), Step::Settle(flush));
}

#[test]
fn so_much_is_fetched_ahead_and_less_beside_a_guest() {
    let scattered = (0..100).fold(DirtyBitmap::new(), |mut missing, n| {
        missing.insert((n * 3..n * 3 + 1).into());
        missing
    });
    let mut hydrator = Hydrator::new(ByteCount(300 * BLOCK), scattered, false);
    let begun =
        std::iter::from_fn(|| matches!(hydrator.fetch_ahead(), Ahead::Begun(_)).then_some(())).count();
    assert_eq!(begun as u64, AHEAD_MAX.fetches);
    let mut ahead = steps(&mut hydrator);
    hydrator.submit(Wish::Read(blocks(297, 298)));
    assert_eq!(steps(&mut hydrator).len(), 4, "one for each missing block around it");
    while ahead.len() as u64 >= AHEAD_MAX_BESIDE_GUEST.fetches {
        assert_eq!(hydrator.fetch_ahead(), Ahead::Wait, "{} under way", ahead.len());
        let Some(Step::Fetch(id, run)) = ahead.pop() else { panic!("they are fetches") };
        hydrator.fetched(id, false);
        assert_eq!(only(&mut hydrator), Step::Store(id, vec![run]));
        hydrator.stored(id, Ok(()));
    }
    assert!(matches!(hydrator.fetch_ahead(), Ahead::Begun(_)));
    let mut whole = Hydrator::new(ByteCount(4096), DirtyBitmap::new(), false);
    assert_eq!(whole.fetch_ahead(), Ahead::Complete);
}

/// What was compared before does not count either, and is fetched for whoever waits; what lies elsewhere does.
#[test]
fn what_the_image_has_refused_is_not_compared_any_more() {
    type Refuse = fn(&mut Hydrator, FetchId);
    let change: Refuse = |hydrator, _| {
        let change = hydrator.submit(write(blocks(402, 403)));
        assert_eq!(only(hydrator), Step::Image(change));
        hydrator.image_done(change, Err(EIO));
        assert_eq!(only(hydrator), Step::Answer(change, Err(EIO)));
    };
    let store: Refuse = |hydrator, id| {
        hydrator.fetched(id, true);
        assert!(matches!(only(hydrator), Step::Store(..)));
        hydrator.stored(id, Err(EIO));
        assert!(matches!(only(hydrator), Step::Answer(_, Err(EIO))));
        hydrator.submit(Wish::Read(blocks(400, 401)));
    };
    for (refuse, stored) in [(change, false), (store, true)] {
        let mut hydrator = hydrator();
        let read = hydrator.submit(Wish::Read(blocks(400, 401)));
        let (id, wanted) = fetch(&mut hydrator);
        assert!(hydrator.may_compare(wanted), "{read:?}");
        refuse(&mut hydrator, id);
        assert!(!hydrator.may_compare(wanted) && hydrator.may_compare((100..101).into()));
        if !stored {
            hydrator.fetched(id, true);
        }
        let (again, other) = fetch(&mut hydrator);
        assert_eq!(wanted, other);
        hydrator.fetched(again, false);
        assert_eq!(only(&mut hydrator), Step::Store(again, vec![wanted]));
    }
}
