//! The agent: owns disks, runs their filters, serves the control API.
//!
//! Each disk belongs to one thread (`disk`), which runs its NBD connections, its filter, its
//! local I/O and its stream to the receiver on one event loop; nothing on the path of a write is
//! shared or locked. Commands reach a disk as messages. `record` is what the agent remembers of
//! its disks; `service` is the control API; `marks` names one instant on several disks; `mounts` serves points of
//! the past, which have no part in any of it.

mod agent;
mod claims;
mod config;
mod disk;
mod look;
mod marks;
mod mounts;
mod qcow2;
mod record;
mod registry;
mod restart;
mod service;
mod shared_socket;
mod spill;
mod successor;
mod watch;

pub use agent::{Agent, AgentError, Surroundings};
pub use backtide_socket::Sockets;
pub use config::{Config, IoEngine, MountLimits, POLL_MAX_US, Places};
pub use look::{look, lost};
pub use successor::Successor;
