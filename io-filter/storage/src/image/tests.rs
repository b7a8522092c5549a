//! The image's calls on real files.

use super::*;

fn image(directory: &Path, size: u64) -> PathBuf {
    let path = directory.join("disk.raw");
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::between(ByteOffset(start), ByteOffset(end))
}

#[test]
fn a_second_agent_is_locked_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 1 << 20);
    let first = ImageFile::open(&path).unwrap();
    let refused = ImageFile::open(&path).unwrap_err();
    assert!(matches!(refused, ImageError::Locked { is_shared: false, .. }));
    // Where the system lists locks, the holder is this process.
    let text = refused.to_string();
    let named = text.contains(&format!("process {} (", std::process::id()));
    assert!(named || text.contains("another process"), "{text}");
    drop(first);
    ImageFile::open(&path).unwrap();
}

#[test]
fn who_shares_a_lock_is_not_called_another_agent() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 1 << 20);
    let probed = File::open(&path).unwrap();
    rustix::fs::flock(&probed, FlockOperation::NonBlockingLockShared).unwrap();
    let refused = ImageFile::open(&path).unwrap_err();
    assert!(matches!(refused, ImageError::Locked { is_shared: true, .. }));
    let text = refused.to_string();
    assert!(text.contains("as udev does") && !text.contains("another agent"), "{text}");
    drop(probed);
    ImageFile::open(&path).unwrap();
}

#[test]
fn a_file_that_has_lost_its_name_is_not_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 1 << 20);
    let old = File::open(&path).unwrap();
    assert!(has_name(&old, &path).unwrap());
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(has_name(&old, &link).unwrap());
    std::fs::rename(&path, directory.path().join("old")).unwrap();
    assert_eq!(has_name(&old, &path).unwrap_err().kind(), io::ErrorKind::NotFound);
    image(directory.path(), 1 << 20);
    assert!(!has_name(&old, &path).unwrap());
}

#[test]
fn what_cannot_be_a_disk_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let odd = image(directory.path(), 1000);
    assert!(
        ImageFile::open(&odd)
            .unwrap_err()
            .to_string()
            .ends_with("has 1000 bytes, which is not a positive multiple of 512")
    );
    assert!(matches!(ImageFile::open(directory.path()), Err(ImageError::Kind { .. })));
    // Not opened: that would wait for somebody at the other end of a FIFO.
    let fifo = directory.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert!(matches!(ImageFile::open(&fifo), Err(ImageError::Kind { .. })));
    assert!(matches!(ImageFile::open(&directory.path().join("none")), Err(ImageError::Missing { .. })));
}

#[test]
fn holes_and_data_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let image = ImageFile::open(&image(directory.path(), 16 << 20)).unwrap();
    image.write_at(ByteOffset(8 << 20), &[7; 4096]).unwrap();
    let allocated = image.allocated(range(0, 16 << 20)).unwrap();
    assert!(
        allocated.iter().any(|extent| extent.contains(range(8 << 20, (8 << 20) + 4096))),
        "{allocated:?}"
    );
    image.zero(range(8 << 20, (8 << 20) + 4096), true).unwrap();
    let mut buffer = [1; 4096];
    image.read_at(ByteOffset(8 << 20), &mut buffer).unwrap();
    assert_eq!(buffer, [0; 4096]);
}

#[test]
fn looking_for_fast_zeroes_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), (1 << 20) + 512);
    std::fs::write(&path, vec![7; (1 << 20) + 512]).unwrap();
    let image = ImageFile::open(&path).unwrap();
    // Whether it is fast is for the file system to say; twice it says the same.
    for may_unmap in [true, false] {
        assert_eq!(image.zeroes_fast(may_unmap), image.zeroes_fast(may_unmap));
    }
    assert!(std::fs::read(&path).unwrap() == vec![7; (1 << 20) + 512]);
}

#[test]
fn zeroes_leave_the_bytes_around_them() {
    for may_unmap in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let path = image(directory.path(), 1 << 20);
        let image = ImageFile::open(&path).unwrap();
        image.write_at(ByteOffset(0), &vec![7; 1 << 20]).unwrap();
        image.zero(range(5000, 300_001), may_unmap).unwrap();
        let content = std::fs::read(&path).unwrap();
        assert!(content[..5000].iter().chain(&content[300_001..]).all(|&byte| byte == 7));
        assert!(content[5000..300_001].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn nothing_is_written_beyond_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 1 << 20);
    let image = ImageFile::open(&path).unwrap();
    assert!(image.write_at(ByteOffset((1 << 20) - 10), &[1; 11]).is_err());
    assert!(image.zero(range((1 << 20) - 10, (1 << 20) + 1), true).is_err());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
}

#[test]
fn a_read_beyond_a_cut_file_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 1 << 20);
    let image = ImageFile::open(&path).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    assert!(image.read_at(ByteOffset(8192), &mut [0; 512]).is_err());
    assert_eq!(image.try_read(range(8192, 8704)).unwrap(), None);
}

fn direct(path: &Path, block_min: u32) -> Result<ImageFile, ImageError> {
    ImageFile::open_with(path, Opening { cache: Cache::Direct, block_min })
}

/// A directory whose file system takes direct I/O: the system's temporary one may not.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap()
}

#[test]
fn a_file_system_without_direct_io_is_named() {
    // A file of the kernel's own has nothing to be direct to.
    let refused = direct(Path::new("/proc/self/comm"), 0).unwrap_err();
    assert!(matches!(refused, ImageError::NotDirect { .. }), "{refused}");
    let text = refused.to_string();
    assert_eq!(text, "/proc/self/comm does not take direct I/O: its file system has only its page cache");
}

#[test]
fn an_image_that_ends_inside_a_block_is_refused() {
    let directory = directory();
    let path = image(directory.path(), (1 << 20) + 512);
    let refused = direct(&path, 4096).unwrap_err().to_string();
    assert!(
        refused.ends_with("1049088 bytes, which is not a multiple of the 4096 that direct I/O to it needs")
    );
    let refused = direct(&path, 8192).unwrap_err();
    assert!(matches!(refused, ImageError::Alignment { .. }), "{refused}");
}

#[test]
fn direct_io_of_any_range_is_that_of_the_page_cache() {
    for block_min in [0, 4096] {
        let directory = directory();
        let path = image(directory.path(), 1 << 20);
        let direct = direct(&path, block_min).unwrap();
        let mut model = vec![0; 1 << 20];
        let mut state = 7u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for round in 0..300 {
            let start = random(1 << 20);
            let end = (start + 1 + random(20_000)).min(1 << 20);
            let (first, last) = (start as usize, end as usize);
            let fill = round as u8;
            match round % 4 {
                0 => direct.zero(range(start, end), round % 8 == 0).unwrap(),
                1 => direct.write_stable(ByteOffset(start), &vec![fill; last - first]).unwrap(),
                _ => direct.write_at(ByteOffset(start), &vec![fill; last - first]).unwrap(),
            }
            model[first..last].fill(if round % 4 == 0 { 0 } else { fill });
            let (from, to) = (random(start + 1), end + random((1 << 20) - end + 1));
            let read = direct.read(range(from, to)).unwrap();
            assert!(read == model[from as usize..to as usize], "round {round}, {from}..{to}");
            let mut buffer = vec![1; 3];
            direct.read_at(ByteOffset(first.min(1000) as u64), &mut buffer).unwrap();
            assert!(buffer == model[first.min(1000)..first.min(1000) + 3]);
        }
        direct.sync().unwrap();
        assert!(std::fs::read(&path).unwrap() == model, "through the page cache");
    }
}

#[test]
fn a_write_that_need_not_wait_is_all_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 1 << 20);
    let image = ImageFile::open(&path).unwrap();
    let wrote = image.try_write(ByteOffset(4096), &[7; 4096]).unwrap();
    if wrote == Wrote::CannotTell {
        assert_eq!(std::fs::read(&path).unwrap()[4096..8192], [0; 4096]);
    } else if wrote == Wrote::All {
        assert_eq!(std::fs::read(&path).unwrap()[4096..8192], [7; 4096]);
    }
    assert!(image.try_write(ByteOffset((1 << 20) - 10), &[1; 11]).is_err());
}

#[test]
fn what_is_let_go_is_read_from_the_device_again() {
    let directory = tempfile::tempdir().unwrap();
    let image = ImageFile::open(&image(directory.path(), 1 << 20)).unwrap();
    image.write_at(ByteOffset(8192), &[7; 4096]).unwrap();
    image.sync().unwrap();
    assert_eq!(image.try_read(range(8192, 12_288)).unwrap().as_deref(), Some(&[7; 4096][..]));
    image.let_go(range(0, 1 << 20));
    // Where nothing is behind the page cache nothing can be let go.
    let in_memory = rustix::fs::statfs(directory.path()).unwrap().f_type == 0x0102_1994;
    assert_eq!(image.try_read(range(8192, 12_288)).unwrap().is_some(), in_memory);
    assert_eq!(&image.read(range(8192, 12_288)).unwrap()[..], [7; 4096]);
}
