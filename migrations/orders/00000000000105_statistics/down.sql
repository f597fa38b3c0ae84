alter table orders
    alter column id set statistics -1,
    alter column user_id set statistics -1,
    alter column status set statistics -1,
    alter column created_at set statistics -1,
    alter column amount set statistics -1,
    alter column description set statistics -1,
    alter column failure_reason set statistics -1,
    alter column updated_at set statistics -1,
    alter column traceparent set statistics -1,
    alter column stamp set statistics -1;
alter table order_event
    alter column xid set statistics -1,
    alter column id set statistics -1,
    alter column order_id set statistics -1,
    alter column status set statistics -1,
    alter column failure_reason set statistics -1,
    alter column at set statistics -1,
    alter column event_id set statistics -1,
    alter column source set statistics -1,
    alter column topic set statistics -1,
    alter column partition set statistics -1,
    alter column log_offset set statistics -1,
    alter column sent_at set statistics -1,
    alter column published_at set statistics -1,
    alter column received_at set statistics -1,
    alter column traceparent set statistics -1;
alter table order_retry
    alter column order_id set statistics -1,
    alter column next_ask_at set statistics -1,
    alter column asks set statistics -1,
    alter column asked_xid set statistics -1;
