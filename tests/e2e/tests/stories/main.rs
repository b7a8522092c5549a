//! What Backtide promises, told as stories with real processes and judged by clients nobody here
//! wrote.

mod acknowledgement;
mod agent_outages;
mod agent_starts;
mod askers;
mod bad_input;
mod behind;
mod connecting;
mod crash_tracking;
mod damage;
mod encrypted;
mod filesystem;
mod going_back;
mod handshake;
mod helping;
mod kill_points;
mod local_io;
mod one_command;
mod operating;
mod operator;
mod protection;
mod receiver_outages;
mod strangers;
mod verify;
mod writable_mounts;
