//! The log receiver: takes streams, keeps timelines, serves points.
