//! The columns that reads and single-row writes use; the set-based statements are in `store.rs`.

diesel::table! {
    account (id) {
        id -> BigInt,
        user_id -> Text,
        balance -> BigInt,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    transfer (account_id, id) {
        id -> BigInt,
        account_id -> BigInt,
        amount -> BigInt,
        order_id -> Nullable<Uuid>,
        balance_after -> BigInt,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    payment (order_id) {
        order_id -> Uuid,
        status -> Text,
        failure_reason -> Nullable<Text>,
        result_event_id -> Uuid,
    }
}
