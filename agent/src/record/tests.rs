use super::*;

#[test]
fn an_attach_whose_epoch_another_agent_had_too_was_not_its_own() {
    let receiver: Address = "unix:/run/r.sock".parse().unwrap();
    let record = DiskRecord::new("vm1".parse().unwrap(), "/images/vm1".to_owned(), receiver);
    let mut record = DiskRecord { epoch: Epoch(6), ..record };
    let mut equal = record.clone();
    equal.fence(Epoch(6));
    assert_eq!((equal.epoch, equal.last_own_epoch()), (Epoch(6), Epoch(5)));
    record.fence(Epoch(9));
    assert_eq!((record.epoch, record.last_own_epoch()), (Epoch(9), Epoch(6)));
    // Fenced again it had no attach of its own in between.
    record.fence(Epoch(30));
    assert_eq!((record.epoch, record.last_own_epoch()), (Epoch(30), Epoch(6)));
}
