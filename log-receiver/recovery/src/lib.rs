//! Recovery points: intervals, holes, and views of a disk at an LSN.
