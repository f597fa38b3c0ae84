//! How accounts stood when they were last seen here, for who writes only where they still do. Whatever it says is safe: a payment that is
//! decided over it is written where it is true and not otherwise.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use foldhash::fast::RandomState;
use quick_cache::UnitWeighter;
use quick_cache::sync::Cache;

use crate::user_id::UserId;

/// Accounts that are kept at most, those used of late: about 2 MB.
const ACCOUNTS_MAX: usize = 10_000;

/// An account as it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stood {
    pub id: i64,
    /// Minor units.
    pub balance: i64,
    pub updated_at: DateTime<Utc>,
}

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Known(Arc<Cache<UserId, Stood, UnitWeighter, RandomState>>);

impl Default for Known {
    fn default() -> Self {
        let (weighter, hasher) = (UnitWeighter, RandomState::default());
        Self(Arc::new(Cache::with(ACCOUNTS_MAX, ACCOUNTS_MAX as u64, weighter, hasher, Default::default())))
    }
}

impl Known {
    /// `None` where one of them is not known.
    pub fn all<'u>(&self, users: impl IntoIterator<Item = &'u UserId>) -> Option<Vec<(UserId, Stood)>> {
        users.into_iter().map(|user| Some((user.clone(), self.0.get(user)?))).collect()
    }

    pub fn learn(&self, accounts: impl IntoIterator<Item = (UserId, Stood)>) {
        accounts.into_iter().for_each(|(user, stood)| self.0.insert(user, stood));
    }

    /// They have moved, or are about to.
    pub fn forget<'u>(&self, users: impl IntoIterator<Item = &'u UserId>) {
        if !self.0.is_empty() {
            users.into_iter().for_each(|user| drop(self.0.remove(user)));
        }
    }
}
