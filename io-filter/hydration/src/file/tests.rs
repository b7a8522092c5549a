use backtide_storage::MemoryStorage;

use super::*;
use crate::header::tests::header;

#[test]
fn an_image_that_cannot_be_synced_at_the_end_ends_nothing() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let path = Path::new("vm1.hydration");
    let missing = DirtyBitmap::of((3..5).into());
    let file = HydrationFile::create(Arc::clone(&storage), path, header(), missing.clone()).unwrap();
    file.present(&[(3..5).into()]).unwrap();
    let synced = || Err(io::Error::other("the device is gone"));
    for attempt in 0..3 {
        file.finish(synced, || panic!("attempt {attempt}: it lacks blocks still")).unwrap_err();
    }
    file.finish(|| Ok(()), || panic!("nobody knows what it has lost")).unwrap_err();
    let again = HydrationFile::open(storage, path, header().boot).unwrap().unwrap();
    assert_eq!(again.missing(), missing);
}
