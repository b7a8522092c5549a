//! A disk that lacks blocks: their content is that of a *point* at a log receiver, and is fetched when it is
//! touched and in the background. A rewind, an attach from a point and a failover begin with such a disk.

mod source;

pub use source::SourcePoint;
