use rcgen::{CertificateParams, KeyPair};

use super::*;
use crate::Shelf;

/// A folder with files of both sides, and what is put there next.
struct Pki {
    directory: tempfile::TempDir,
}

/// When a certificate is valid, in years.
type Years = std::ops::Range<i32>;

const GOOD: Years = 2020..2090;

impl Pki {
    fn new() -> Self {
        let pki = Self { directory: tempfile::tempdir().unwrap() };
        pki.put("one", GOOD);
        pki
    }

    fn folder(&self) -> &Path {
        self.directory.path()
    }

    /// A certificate and its key, each as a text.
    fn made(name: &str, years: Years) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.not_before = rcgen::date_time_ymd(years.start, 1, 1);
        params.not_after = rcgen::date_time_ymd(years.end, 1, 1);
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    fn write(&self, file: &str, text: &str) {
        // As a renewal does it: of another inode, so that no clock has to tick.
        std::fs::write(self.folder().join("new"), text).unwrap();
        std::fs::rename(self.folder().join("new"), self.folder().join(file)).unwrap();
    }

    fn put(&self, name: &str, years: Years) {
        let (certificate, key) = Self::made(name, years);
        self.write("ca-cert.pem", &certificate);
        self.write("client-cert.pem", &certificate);
        self.write("client-key.pem", &key);
    }
}

static SHELF: Shelf<()> = Shelf::new();

/// Follows `pki` as an agent's end of a stream does.
fn following(pki: &Pki) -> Reloading<()> {
    let load = |folder: &Path| {
        let own = crate::folder::identity(folder, Role::Client)?;
        let chain = own.chain.clone();
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(crate::folder::authorities(folder)?)
            .with_client_auth_cert(own.chain, own.key)
            .map_err(|source| TlsError::unusable(folder, Role::Client, source))?;
        Ok(Loaded { value: (), chain })
    };
    SHELF.follow(Role::Client, pki.folder(), load).unwrap()
}

/// Whose certificate is in use after a look.
async fn used(reloading: &Reloading<()>) -> String {
    reloading.current().await.unwrap();
    reloading.certificate().unwrap().subject
}

#[tokio::test]
async fn what_changes_is_read_again_and_what_is_worse_is_not_used() {
    let pki = Pki::new();
    let reloading = following(&pki);
    assert_eq!(used(&reloading).await, "one");
    assert_eq!(reloading.warnings(), [""; 0]);
    pki.put("two", GOOD);
    assert_eq!(used(&reloading).await, "two");

    let (whole, key) = Pki::made("three", GOOD);
    for (what, file, text, said) in [
        ("nonsense", "client-key.pem", "nonsense", "client-key.pem\" for TLS, where a private key in PEM is"),
        ("an empty file", "client-cert.pem", "", "client-cert.pem\" holds no certificate"),
        (
            "half a file",
            "client-cert.pem",
            &whole[..whole.len() / 2],
            "client-cert.pem\" for TLS, where cert",
        ),
        ("half of the authorities", "ca-cert.pem", &whole[..whole.len() / 2], "ca-cert.pem\" for TLS"),
        ("a certificate before its key", "client-cert.pem", &whole, "client-key.pem\" is not that of the"),
        ("a key before its certificate", "client-key.pem", &key, "client-key.pem\" is not that of the"),
    ] {
        pki.write(file, text);
        assert_eq!(used(&reloading).await, "two", "{what}");
        let warnings = reloading.warnings().join("\n");
        assert!(warnings.contains("the old ones stay in use until 2090-01-01T00:00:00Z: "), "{warnings}");
        assert!(warnings.contains(said), "{what}: {warnings}");
        assert!(
            warnings.ends_with("put a certificate there with its own key, whole files both"),
            "{warnings}"
        );
        pki.put("two", GOOD);
        assert_eq!((used(&reloading).await, reloading.warnings()), ("two".to_owned(), vec![]), "{what}");
    }
    std::fs::remove_file(pki.folder().join("client-cert.pem")).unwrap();
    assert_eq!(used(&reloading).await, "two");
    for (years, said) in
        [(2010..2021, "has expired at 2021-01-01"), (2088..2099, "is not valid before 2088-01-01")]
    {
        pki.put("three", years);
        assert_eq!(used(&reloading).await, "two", "{said}");
        let warnings = reloading.warnings().join("\n");
        assert!(warnings.contains(said) && warnings.contains("client-cert.pem"), "{warnings}");
        assert!(warnings.contains("is the clock right?"), "{warnings}");
    }
    pki.put("three", GOOD);
    assert_eq!((used(&reloading).await, reloading.warnings()), ("three".to_owned(), vec![]));
}

#[tokio::test]
async fn one_that_came_too_early_is_used_when_its_time_comes() {
    let pki = Pki::new();
    let reloading = following(&pki);
    assert_eq!(used(&reloading).await, "one");
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, "two");
    params.not_before = (std::time::SystemTime::now() + Duration::from_secs(2)).into();
    pki.write("client-cert.pem", &params.self_signed(&key).unwrap().pem());
    pki.write("client-key.pem", &key.serialize_pem());
    assert_eq!(used(&reloading).await, "one");
    let early = reloading.warnings();
    assert!(early.iter().any(|early| early.contains("is not valid before")), "{early:?}");
    while used(&reloading).await != "two" {
        tokio::task::yield_now().await;
    }
    assert_eq!(reloading.warnings(), [""; 0]);
}

#[tokio::test]
async fn who_has_nothing_better_takes_what_there_is() {
    let pki = Pki::new();
    pki.put("old", 2010..2021);
    let reloading = following(&pki);
    assert_eq!(used(&reloading).await, "old");
    assert!(reloading.warnings().join("\n").ends_with("client-cert.pem) has expired"));
    pki.put("older", 2010..2020);
    assert_eq!(used(&reloading).await, "older");
    pki.put("new", GOOD);
    assert_eq!((used(&reloading).await, reloading.warnings()), ("new".to_owned(), vec![]));
}

#[tokio::test]
async fn who_has_none_yet_is_told_and_has_them_when_they_come() {
    let pki = Pki::new();
    let (certificate, key) = Pki::made("one", GOOD);
    pki.write("client-key.pem", "nonsense");
    let reloading = following(&pki);
    let error = reloading.current().await.err().unwrap().chain();
    assert!(error.contains("client-key.pem"), "{error}");
    let warnings = reloading.warnings().join("\n");
    assert!(warnings.contains("cannot be used: ") && !warnings.contains("stay in use"), "{warnings}");
    pki.write("client-cert.pem", &certificate);
    pki.write("client-key.pem", &key);
    assert_eq!(used(&reloading).await, "one");
}

#[tokio::test]
async fn who_comes_back_to_files_that_are_not_whole_finds_the_good_ones() {
    let pki = Pki::new();
    assert_eq!(used(&following(&pki)).await, "one");
    pki.write("client-key.pem", "");
    let another = Pki::new();
    assert_eq!(used(&following(&another)).await, "one");
    in_use::look_again().await;
    assert_eq!(in_use::warnings(), [""; 0], "nobody uses them");
    let reloading = following(&pki);
    assert_eq!(used(&reloading).await, "one");
    let all = in_use::warnings();
    assert!(all.len() == 1 && all[0].contains("stay in use"), "{all:?}");
    let another = following(&pki);
    assert_eq!((used(&another).await, in_use::warnings()), ("one".to_owned(), all), "each is said once");
}

/// Opening a pipe to read ends when somebody writes to it, as a file system stands still until its server is back.
#[tokio::test]
async fn files_that_nobody_answers_for_hold_up_nobody() {
    let pki = Pki::new();
    let reloading = following(&pki);
    let others = Pki::new();
    let other = following(&others);
    assert_eq!(used(&reloading).await, "one");
    let pipe = pki.folder().join("client-key.pem");
    std::fs::remove_file(&pipe).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
    assert_eq!(used(&reloading).await, "one");
    // The look may have begun a moment after it was asked for: it is told of as silent when it has lasted as long.
    let warnings = loop {
        let warnings = reloading.warnings().join("\n");
        if !warnings.is_empty() {
            break warnings;
        }
        tokio::task::yield_now().await;
    };
    assert!(warnings.contains("has not answered for") && warnings.contains("stay in use"), "{warnings}");
    // It is waited for once, and nobody else's certificates know of it.
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    for _ in 0..3 {
        used(&reloading).await;
    }
    assert_eq!(tokio::time::Instant::now(), before);
    tokio::time::resume();
    others.put("two", GOOD);
    in_use::look_again().await;
    assert_eq!(other.certificate().unwrap().subject, "two");
    let all = in_use::warnings();
    assert!(all.len() == 1 && all[0].contains("has not answered for"), "{all:?}");

    // The server is back; it had a new one meanwhile.
    let (certificate, key) = Pki::made("two", GOOD);
    pki.write("client-cert.pem", &certificate);
    let writer = std::fs::File::options().write(true).open(&pipe).unwrap();
    pki.write("client-key.pem", &key);
    drop(writer);
    while reloading.notes().looks.under_way().is_some() {
        tokio::task::yield_now().await;
    }
    assert_eq!((used(&reloading).await, reloading.warnings()), ("two".to_owned(), vec![]));
}
