//! How long history is kept: the ladder of each disk, what of it goes when, and the thread that sees to it.
//!
//! Every point is kept for a while; then single points, each an image, at the pace of the ladder's rungs; points that
//! somebody pinned as long as they are pinned, and locked ones until a time, even when the store is full. Nothing goes that
//! the ladder still promises, unless the store is nearly full and the receiver was told to shrink the oldest history then.

mod doubts;
mod forecast;
mod keeper;
mod ladder;
mod locks;
mod plan;
mod policy;

pub(crate) use doubts::begin_doubts;
pub(crate) use forecast::Growth;
pub(crate) use keeper::{Keeper, KeeperWatch};
pub(crate) use ladder::{Ladder, LadderError, Span};
pub(crate) use locks::{Lock, Moment};
pub(crate) use plan::{
    Plan, PlanError, Pressure, Reach, before_damage, every_change_from, first_point, oldest_that_goes, plan,
    plan_all, plan_ended, plan_readable,
};
pub(crate) use policy::{FILE, NotChanged, Pin, Policies, Policy, damage_of, write_anew};
