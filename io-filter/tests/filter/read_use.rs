//! What a driver may make of what the filter reads, where it reads it.

use backtide_io_filter::{AckPolicy, ReadUse, VerifyError};

use crate::{
    common::at,
    found_by_simulation::{come_into_sync, filter},
};

#[test]
fn reads_are_prepared_for_a_verify_until_it_has_ended() {
    let mut filter = filter(AckPolicy::Local);
    assert_eq!(filter.read_use(), None);
    come_into_sync(&mut filter);
    assert_eq!(filter.read_use(), None);
    filter.start_verify(at(1), false).unwrap();
    assert_eq!(filter.read_use(), Some(ReadUse::Compare));
    assert_eq!(filter.start_verify(at(1), false), Err(VerifyError::Running));
    filter.cancel_verify(at(1));
    assert_eq!(filter.read_use(), None, "what it found is kept");
    filter.start_verify(at(1), false).expect("another one, though the first one's result is kept");
}
