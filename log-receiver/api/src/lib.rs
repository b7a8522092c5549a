//! Request and response types of the receiver's control API, and its client.
