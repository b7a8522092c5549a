//! NBD codec, handshake and transmission state machines, without I/O.
