//! The one file seam: real, in-memory and faulty files.
