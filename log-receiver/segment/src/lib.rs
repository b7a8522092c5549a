//! The log's files: segments of self-describing, checksummed records.
