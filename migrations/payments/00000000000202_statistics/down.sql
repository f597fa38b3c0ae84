alter table account
    alter column id set statistics -1,
    alter column user_id set statistics -1,
    alter column balance set statistics -1,
    alter column created_at set statistics -1,
    alter column updated_at set statistics -1;
alter table transfer
    alter column id set statistics -1,
    alter column account_id set statistics -1,
    alter column order_id set statistics -1,
    alter column from_account set statistics -1,
    alter column to_account set statistics -1,
    alter column amount set statistics -1,
    alter column balance_after set statistics -1,
    alter column created_at set statistics -1;
alter table payment
    alter column order_id set statistics -1,
    alter column user_id set statistics -1,
    alter column amount set statistics -1,
    alter column status set statistics -1,
    alter column failure_reason set statistics -1,
    alter column result_event_id set statistics -1,
    alter column event_id set statistics -1,
    alter column source set statistics -1,
    alter column topic set statistics -1,
    alter column partition set statistics -1,
    alter column log_offset set statistics -1,
    alter column sent_at set statistics -1,
    alter column published_at set statistics -1,
    alter column received_at set statistics -1,
    alter column decided_at set statistics -1,
    alter column traceparent set statistics -1;
