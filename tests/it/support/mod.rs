//! What the tests stand on.
#![allow(dead_code, reason = "not every module of tests uses everything")]

pub mod postgres;
