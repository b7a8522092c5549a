//! The stream between filter and log receiver: messages, framing, versions.
