//! TLS while certificates are renewed: who has good ones goes on with them.

mod support;

use std::path::Path;

use backtide_export::{Client, Limits, Listener, NbdUri, SocketMode, UriTls};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose};
use support::{FileExport, Fixed, GRACE, Place, on_a_worker};

/// Files of both sides that end with a year, signed by a new authority.
fn renew(folder: &Path, year: i32) {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(folder.join("ca-cert.pem"), authority.pem()).unwrap();
    for whose in ["server", "client"] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        let certificate = params.signed_by(&key, &authority).unwrap();
        std::fs::write(folder.join(format!("{whose}-cert.pem")), certificate.pem()).unwrap();
        std::fs::write(folder.join(format!("{whose}-key.pem")), key.serialize_pem()).unwrap();
    }
}

#[test]
fn who_has_good_certificates_goes_on_with_them_when_worse_ones_come() {
    on_a_worker(async {
        let place = Place::new();
        let folder = place.path("pki");
        std::fs::create_dir(&folder).unwrap();
        renew(&folder, 2090);
        let tls = UriTls { certificates: folder.clone(), hostname: None, required: true };
        let uri = NbdUri { tls: Some(tls), ..place.uri("disk") };
        let image = place.image(1 << 20);
        let serve = async || {
            let export = FileExport::open("disk", &image, false).unwrap();
            let listener = Listener::bind_uri(&uri, SocketMode::PRIVATE).await.unwrap();
            listener.serve(Fixed::one(export), Limits::default())
        };
        let mut server = serve().await;
        let client = Client::connect(&uri).await.unwrap();
        for (what, year) in [("renewed", 2091), ("expired", 2021)] {
            renew(&folder, year);
            Client::connect(&uri).await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        }
        std::fs::remove_file(folder.join("client-cert.pem")).unwrap();
        std::fs::write(folder.join("server-key.pem"), "").unwrap();
        Client::connect(&uri).await.unwrap();
        // A server that is given up and comes back, as that of a disk that is set back.
        server.shutdown(GRACE).await;
        server = serve().await;
        Client::connect(&uri).await.unwrap();
        drop(client);
        server.shutdown(GRACE).await;
        renew(&folder, 2092);
        server = serve().await;
        Client::connect(&uri).await.unwrap();
        server.shutdown(GRACE).await;
    });
}
