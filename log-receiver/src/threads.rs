//! Which threads may panic without the process ending.

/// It reads for somebody: a point, a log that is compared.
pub(crate) const READ: &str = "read";

/// It looks through the store.
pub(crate) const SCRUB: &str = "scrub";

/// It makes logs durable.
pub(crate) const COMMIT: &str = "commit";

/// Names of threads whose panics are told by whoever waits for their work, and leave nothing that goes on being used: what
/// reads changes nothing, a scrub is called off, and a log that was being made durable counts as failed and is read from its
/// files again. So bytes of one disk that the program cannot bear end neither the streams of all others nor, again and again,
/// each receiver that comes to them. A panic of any other thread should end the process.
pub const THREADS_APART: &[&str] = &[READ, SCRUB, COMMIT];
