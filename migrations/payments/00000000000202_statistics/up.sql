-- As in shared/00000000000008_statistics: what is looked for is sampled sparsely, the rest not at all.
alter table account
    alter column id set statistics 10,
    alter column user_id set statistics 10,
    alter column balance set statistics 0,
    alter column created_at set statistics 0,
    alter column updated_at set statistics 0;
alter table transfer
    alter column id set statistics 10,
    alter column account_id set statistics 10,
    alter column order_id set statistics 10,
    alter column from_account set statistics 0,
    alter column to_account set statistics 0,
    alter column amount set statistics 0,
    alter column balance_after set statistics 0,
    alter column created_at set statistics 0;
alter table payment
    alter column order_id set statistics 10,
    alter column user_id set statistics 0,
    alter column amount set statistics 0,
    alter column status set statistics 0,
    alter column failure_reason set statistics 0,
    alter column result_event_id set statistics 0,
    alter column event_id set statistics 0,
    alter column source set statistics 0,
    alter column topic set statistics 0,
    alter column partition set statistics 0,
    alter column log_offset set statistics 0,
    alter column sent_at set statistics 0,
    alter column published_at set statistics 0,
    alter column received_at set statistics 0,
    alter column decided_at set statistics 0,
    alter column traceparent set statistics 0;
