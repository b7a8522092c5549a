//! Serving and reaching disks over NBD: tokio drivers around backtide-nbd.
