//! Buckets of one level in order, and under each the places of the segments that have it, in few bytes.
//!
//! ```text
//! bucket = number less the one before (left out where a group begins)  place  place less the one before  ...
//! ```
//! Numbers are LEB128; that of a place has one more bit at its lower end, which says whether another follows. With one
//! segment there is nothing to say of places. Every [`GROUP`] buckets the number and the position of the first are noted,
//! so that a look-up halves these and then reads one group.

/// Buckets of one group.
const GROUP: u32 = 64;

/// See the module's description.
#[derive(Default)]
pub(super) struct Lists {
    bytes: Vec<u8>,
    groups: Vec<Group>,
    count: u32,
}

#[derive(Clone, Copy)]
struct Group {
    number: u32,
    at: u32,
}

/// Makes [`Lists`], bucket after bucket.
pub(super) struct Builder {
    lists: Lists,
    alone: bool,
    last: u32,
}

/// Reads [`Lists`], bucket after bucket.
pub(super) struct Reader<'a> {
    lists: &'a Lists,
    alone: bool,
    next: u32,
    at: usize,
    number: u32,
}

impl Lists {
    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.len() + self.groups.len() * size_of::<Group>()
    }

    /// All buckets; `alone` says that there is one segment only.
    pub(super) fn read(&self, alone: bool) -> Reader<'_> {
        Reader { lists: self, alone, next: 0, at: 0, number: 0 }
    }

    /// Buckets from at most a group before `number` on; none when there are none at all.
    pub(super) fn read_from(&self, number: u32, alone: bool) -> Option<Reader<'_>> {
        let behind = self.groups.partition_point(|group| group.number <= number);
        let group = behind.saturating_sub(1);
        let at = self.groups.get(group)?.at as usize;
        Some(Reader { next: group as u32 * GROUP, at, ..self.read(alone) })
    }

    /// The first bucket at or behind `number` goes to `places`; its number.
    pub(super) fn find(&self, number: u32, alone: bool, places: &mut Vec<u16>) -> Option<u32> {
        let mut reader = self.read_from(number, alone)?;
        loop {
            let found = reader.next(places)?;
            if found >= number {
                return Some(found);
            }
        }
    }
}

impl Builder {
    pub(super) fn new(alone: bool) -> Self {
        Self { lists: Lists::default(), alone, last: 0 }
    }

    /// Adds a bucket above those before; its places are ascending and some.
    pub(super) fn push(&mut self, number: u32, places: &[u16]) {
        let lists = &mut self.lists;
        if lists.count.is_multiple_of(GROUP) {
            let at = u32::try_from(lists.bytes.len()).expect("fewer bytes than records of a log");
            lists.groups.push(Group { number, at });
        } else {
            put(&mut lists.bytes, number - self.last);
        }
        lists.count += 1;
        self.last = number;
        if self.alone {
            return;
        }
        let mut before = 0;
        for (nth, place) in places.iter().enumerate() {
            let more = u32::from(nth + 1 < places.len());
            put(&mut lists.bytes, u32::from(place - before) << 1 | more);
            before = *place;
        }
    }

    pub(super) fn finish(mut self) -> Lists {
        self.lists.bytes.shrink_to_fit();
        self.lists.groups.shrink_to_fit();
        self.lists
    }
}

impl Reader<'_> {
    /// The next bucket's number; its places go to `places`, which loses what it has.
    pub(super) fn next(&mut self, places: &mut Vec<u16>) -> Option<u32> {
        places.clear();
        if self.next == self.lists.count {
            return None;
        }
        if self.next.is_multiple_of(GROUP) {
            self.number = self.lists.groups[(self.next / GROUP) as usize].number;
        } else {
            self.number += self.take();
        }
        self.next += 1;
        let mut place = 0;
        loop {
            let code = if self.alone { 0 } else { self.take() };
            place += (code >> 1) as u16;
            places.push(place);
            if code & 1 == 0 {
                return Some(self.number);
            }
        }
    }

    fn take(&mut self) -> u32 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = self.lists.bytes[self.at];
            self.at += 1;
            value |= u32::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return value;
            }
            shift += 7;
        }
    }
}

fn put(bytes: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn what_is_packed_is_found_by_its_number_and_by_any_before() {
        let mut state = 7_u64;
        let mut random = move |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound
        };
        for (count, alone) in [(0, false), (1, true), (64, false), (65, true), (1000, false), (1000, true)] {
            let mut model = BTreeMap::new();
            while model.len() < count {
                let spread = [3, 1 << 10, 1 << 32][random(3) as usize];
                let number = (random(1 << 20) * 4000).wrapping_add(random(spread)) as u32;
                let mut places: Vec<u16> = (0..=random(5)).map(|_| random(1 << 15) as u16).collect();
                places.sort_unstable();
                places.dedup();
                model.insert(number, if alone { vec![0] } else { places });
            }
            let mut builder = Builder::new(alone);
            model.iter().for_each(|(number, places)| builder.push(*number, places));
            let lists = builder.finish();
            let (mut reader, mut places) = (lists.read(alone), Vec::new());
            for (number, expected) in &model {
                assert_eq!((reader.next(&mut places), &places), (Some(*number), expected));
            }
            assert_eq!(reader.next(&mut places), None);
            let mut asked: Vec<u32> =
                model.keys().flat_map(|at| [at.saturating_sub(1), *at, at + 1]).collect();
            asked.extend([0, u32::MAX]);
            for number in asked {
                let expected = model.range(number..).next();
                let found = lists.find(number, alone, &mut places);
                assert_eq!(found, expected.map(|(number, _)| *number), "{number}");
                if let Some((_, expected)) = expected {
                    assert_eq!(&places, expected, "{number}");
                }
            }
        }
    }
}
