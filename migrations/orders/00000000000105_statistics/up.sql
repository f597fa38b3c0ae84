-- As in shared/00000000000008_statistics: what is looked for is sampled sparsely, the rest not at all.
alter table orders
    alter column id set statistics 10,
    alter column user_id set statistics 10,
    alter column status set statistics 10,
    alter column created_at set statistics 10,
    alter column amount set statistics 0,
    alter column description set statistics 0,
    alter column failure_reason set statistics 0,
    alter column updated_at set statistics 0,
    alter column traceparent set statistics 0,
    alter column stamp set statistics 0;
alter table order_event
    alter column xid set statistics 10,
    alter column id set statistics 10,
    alter column order_id set statistics 10,
    alter column status set statistics 10,
    alter column failure_reason set statistics 0,
    alter column at set statistics 0,
    alter column event_id set statistics 0,
    alter column source set statistics 0,
    alter column topic set statistics 0,
    alter column partition set statistics 0,
    alter column log_offset set statistics 0,
    alter column sent_at set statistics 0,
    alter column published_at set statistics 0,
    alter column received_at set statistics 0,
    alter column traceparent set statistics 0;
alter table order_retry
    alter column order_id set statistics 10,
    alter column next_ask_at set statistics 10,
    alter column asks set statistics 0,
    alter column asked_xid set statistics 0;
