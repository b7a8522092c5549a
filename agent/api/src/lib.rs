//! Request and response types of the agent's control API, and its client.
