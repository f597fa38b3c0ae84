//! Accepting an order.

use crate::db::DbError;

use super::order::Order;

/// The stored order, and whether it was there before.
#[derive(Clone, Debug)]
pub struct Placed {
    pub order: Order,
    /// The same id with the same fields came before.
    pub replayed: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    #[error("an order with this id exists and differs")]
    Conflict,
    #[error(transparent)]
    Db(#[from] DbError),
}
