//! The directory against a plain list of segments, and the number of nodes and candidates.

use backtide_units::ByteOffset;

use super::*;

fn buckets(numbers: impl IntoIterator<Item = u32>) -> RoaringTreemap {
    numbers.into_iter().map(|number| Bucket::new(0, number).expect("a bucket").code()).collect()
}

fn bucket_range(number: u32) -> ByteRange {
    Bucket::new(0, number).expect("a bucket").range()
}

fn versions(min: u64, max: u64) -> Versions {
    Versions { min: Lsn(min), max: Lsn(max) }
}

/// Segment n has versions 10n to 10n + 9, bucket n and bucket 1,000,000.
fn directory(segments: u32, bytes_max: ByteCount) -> Directory<u32> {
    let mut directory = Directory::new(bytes_max);
    for n in 0..segments {
        let from = u64::from(n) * 10;
        directory.push(Leaf::new(n, versions(from, from + 9), &buckets([n, 1_000_000])));
        while let Some(upkeep) = directory.upkeep() {
            directory.install(upkeep.run());
        }
    }
    directory
}

fn found(directory: &Directory<u32>, bucket: u32, at: Lsn) -> Vec<u32> {
    directory.candidates(bucket_range(bucket), 0, at).map(|(segment, _)| *segment).collect()
}

const PLENTY: ByteCount = ByteCount(1 << 30);

#[test]
fn a_bucket_finds_the_segments_that_have_it_and_no_others() {
    let directory = directory(1000, PLENTY);
    assert_eq!(directory.iter().count(), 1000);
    assert!(directory.iter().copied().eq(0..1000));
    for n in [0, 7, 8, 511, 512, 999] {
        assert_eq!(found(&directory, n, Lsn::MAX), [n]);
        assert!(directory.has(0, bucket_range(n)));
    }
    assert!(found(&directory, 1001, Lsn::MAX).is_empty());
    assert!(!directory.has(0, bucket_range(1001)));
    assert!(!directory.has(1, bucket_range(3)));
    assert!(found(&directory, 1_000_000, Lsn::MAX).into_iter().eq((0..1000).rev()));
}

#[test]
fn there_are_few_nodes_however_many_segments() {
    for segments in [1, 8, 100, 5000] {
        let nodes = directory(segments, PLENTY).nodes.len();
        assert!(nodes <= 7 * 5, "{nodes} nodes of {segments} segments");
    }
}

#[test]
fn work_that_waits_changes_no_answer_and_ends() {
    let mut late = Directory::new(ByteCount(20_000));
    let mut under_way = None;
    for n in 0..500 {
        late.push(Leaf::new(n, versions(u64::from(n), u64::from(n)), &buckets([n % 7, n])));
        if n % 3 == 0 {
            // Segments come while it is under way.
            if let Some(done) = under_way.take() {
                late.install(done);
            }
            under_way = late.upkeep().map(Upkeep::run);
        }
        let found = found(&late, n, Lsn::MAX);
        assert!(found.contains(&n), "{n}: {found:?}");
    }
    if let Some(done) = under_way {
        late.install(done);
    }
    let mut steps = 0;
    while let Some(upkeep) = late.upkeep() {
        late.install(upkeep.run());
        steps += 1;
    }
    assert!(steps < 200 && late.nodes.len() < 30, "{steps} steps, {} nodes", late.nodes.len());
    assert!(late.iter().copied().eq(0..500));
}

#[test]
fn candidates_begin_at_the_version_asked_for() {
    let directory = directory(1000, PLENTY);
    let mut candidates = directory.candidates(bucket_range(1_000_000), 0, Lsn(4321));
    assert_eq!(candidates.version_max(), Some(Lsn(4321)));
    assert_eq!(candidates.next().map(|(segment, _)| *segment), Some(432));
    // Whoever has found a version above this needs no further candidate.
    assert_eq!(candidates.version_max(), Some(Lsn(4319)));
    assert_eq!(found(&directory, 1_000_000, Lsn(4321)).len(), 433);
    assert!(found(&directory, 999, Lsn(100)).is_empty());
}

#[test]
fn versions_of_a_pass_in_a_later_segment_are_not_missed() {
    let mut directory = Directory::new(PLENTY);
    // A pass at 50 is delivered while records above it are forwarded.
    for (n, (min, max)) in [(1, 49), (51, 60), (50, 70), (71, 80), (50, 50)].into_iter().enumerate() {
        directory.push(Leaf::new(n as u32, versions(min, max), &buckets([3])));
    }
    let mut candidates = directory.candidates(bucket_range(3), 0, Lsn(50));
    let mut seen = Vec::new();
    while let Some(bound) = candidates.version_max() {
        let (segment, _) = candidates.next().expect("there is a bound");
        seen.push((*segment, bound.0));
    }
    // Segments with versions above 50 only are looked at and found empty; what counts is that none is left
    // out that is not, and that no bound is below what follows.
    for (segment, bound) in [(4, 50), (2, 50), (0, 49)] {
        assert!(seen.contains(&(segment, bound)), "{seen:?}");
    }
}

#[test]
fn with_little_memory_it_is_coarser_and_still_leaves_none_out() {
    let plenty = directory(600, PLENTY);
    let lists: usize = plenty.nodes.iter().map(|placed| placed.node.list_bytes()).sum();
    let limit = ByteCount(plenty.bytes().0 - lists as u64 / 3);
    let little = directory(600, limit);
    assert!(little.bytes() <= limit, "{} of {limit}", little.bytes());
    for n in [0, 31, 32, 300, 599] {
        let found = found(&little, n, Lsn::MAX);
        assert!(found.contains(&n) && found.len() < 600, "{n}: {} found", found.len());
        assert!(little.has(0, bucket_range(n)));
    }
}

#[test]
fn a_bucket_takes_less_than_two_bytes_however_they_lie() {
    let mut state = 1_u64;
    let mut directory = Directory::new(PLENTY);
    for n in 0..100 {
        let random = (0..20_000).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as u32
        });
        directory.push(Leaf::new(n, versions(1, 9), &buckets(random)));
        while let Some(upkeep) = directory.upkeep() {
            directory.install(upkeep.run());
        }
    }
    let buckets: u64 = directory.nodes.iter().map(|placed| placed.node.buckets()).sum();
    let lists: usize = directory.nodes.iter().map(|placed| placed.node.list_bytes()).sum();
    assert!(lists as u64 <= buckets / 4 * 7, "{lists} bytes for {buckets} buckets");
    // And few segments are asked in vain.
    let asked: usize = (0..100).map(|n| found(&directory, n * 100_003, Lsn::MAX).len()).sum();
    assert!(asked < 100 * 30, "{asked} of 10,000");
}

#[test]
fn large_buckets_are_found_from_any_place_in_them() {
    let mut directory = Directory::new(PLENTY);
    let level_3 = Bucket::new(3, 2).expect("a bucket");
    directory.push(Leaf::new(1, versions(1, 9), &[level_3.code()].into_iter().collect()));
    directory.push(Leaf::new(2, versions(10, 19), &buckets([1])));
    let inside = ByteRange::between(ByteOffset(level_3.range().start().0 + 70_000), level_3.range().end());
    let candidates: Vec<_> = directory.candidates(inside, 0, Lsn::MAX).collect();
    assert_eq!(candidates, [(&1, level_3)]);
    assert!(directory.has(3, inside) && !directory.has(2, inside));
    assert!(directory.candidates(inside, 4, Lsn::MAX).next().is_none());
}
