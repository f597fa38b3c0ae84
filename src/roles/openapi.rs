//! The merged OpenAPI document, without anything running.

use std::io::Write;

use crate::{gateway, orders, payments};

use super::RoleError;

/// Prints it on standard output.
pub fn run() -> Result<(), RoleError> {
    let document = gateway::document(orders::document(), payments::document());
    let mut out = std::io::stdout().lock();
    writeln!(out, "{document:#}").map_err(RoleError::Output)
}
