//! The session against a log in memory: every state with every message, every row of the handshake.

mod fencing;
mod fixture;
mod handshake;
mod loss;
mod rights;
mod streaming;
mod table;
