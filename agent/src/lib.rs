//! The agent: owns disks, runs their filters, serves the control API.
