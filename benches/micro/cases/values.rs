//! Values and their texts: money, partitions, trace positions.

use shopd::messaging::log::partitioner::partition_of;
use shopd::money::Amount;
use shopd::trace::TraceContext;

use super::wire::{amount, ids};
use super::{Case, INPUTS, inputs};

pub fn cases() -> Vec<Case> {
    let amounts = || inputs(amount);
    vec![
        Case::over("amount_parse", || inputs(|n| amount(n).to_string()), |text| Amount::from_json(text)),
        Case::over("amount_format", amounts, Amount::to_string),
        Case::over("amount_json", amounts, serde_json::to_vec::<Amount>),
        Case::over("partition_of_user", || inputs(|n| format!("customer-{n:06}")), |key| partition_of(key.as_bytes(), 12)),
        Case::over("partition_of_order", || ids().map(|id| id.to_string()), |key| partition_of(key.as_bytes(), 12)),
        Case::over("trace_read", parents, |text| TraceContext::parse(text)),
        Case::over(
            "trace_write",
            || parents().map(|text| TraceContext::parse(&text).map_or_else(TraceContext::new_root, TraceContext::child)),
            TraceContext::traceparent,
        ),
    ]
}

fn parents() -> [String; INPUTS] {
    ids().map(|id| format!("00-{}-00f067aa0ba902b7-01", id.simple()))
}
