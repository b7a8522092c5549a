//! Dirty bitmaps and their file.
