//! The filter state machine of one disk: capture, window, freeze, drain.
