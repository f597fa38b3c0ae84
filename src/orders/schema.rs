//! The columns of `orders` that reads use; the statements of writes are in `store.rs`.

diesel::table! {
    orders (id) {
        id -> Uuid,
        user_id -> Text,
        amount -> BigInt,
        description -> Nullable<Text>,
        status -> Text,
        failure_reason -> Nullable<Text>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        stamp -> Nullable<Uuid>,
    }
}
