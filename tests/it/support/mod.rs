//! What the tests stand on.
#![allow(dead_code, reason = "not every module of tests uses everything")]

pub mod acl;
pub mod books;
pub mod brokers;
pub mod cluster;
pub mod collector;
pub mod history;
pub mod inside;
pub mod kafka;
pub mod load;
pub mod postgres;
pub mod secure;
pub mod shop;
