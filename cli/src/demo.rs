//! The demo: a scratch disk is protected, written, cut off from its receiver, resynchronized and
//! restored, and everything is proved against what the demo itself wrote.
//!
//! Nothing is simulated: the guest is an NBD client, the receiver is really stopped, the restores
//! are those of `backtide restore`.

mod guest;
mod story;

pub(crate) use story::tell;
