-- A row of the outbox holds several messages: a row and its entry in the index cost a writer three times what a message in an array does
-- (docs/adr/0013). The arrays are of one length, and a row's messages are published in their order. Such a row's key, traceparent and
-- request_id are empty and its payload is null; event_id and created_at are the first message's. A row without arrays is one message, as
-- the version before this writes them and a dead letter's copy still is.
alter table outbox
    add column event_ids    uuid[],
    add column keys         text[],
    add column payloads     bytea[],
    add column traceparents text[],
    add column request_ids  text[],
    add column created_ats  timestamptz[];

-- A row of several fills a page; it must not be compressed and moved out of the table because it is longer than a quarter of one.
alter table outbox_1 set (toast_tuple_target = 8160);
alter table outbox_2 set (toast_tuple_target = 8160);
alter table outbox_3 set (toast_tuple_target = 8160);
alter table outbox_4 set (toast_tuple_target = 8160);

-- The messages one by one; by (xid, id, n) in the order in which they are published.
create view outbox_message as
select o.xid, o.id, m.n, m.event_id, o.topic, m.key, m.payload, o.event_type, o.source, m.traceparent, m.request_id, m.created_at
  from outbox o
 cross join lateral unnest(coalesce(o.event_ids, array[o.event_id]), coalesce(o.keys, array[o.key]), coalesce(o.payloads, array[o.payload]),
                           coalesce(o.traceparents, array[o.traceparent]), coalesce(o.request_ids, array[o.request_id]),
                           coalesce(o.created_ats, array[o.created_at]))
            with ordinality m (event_id, key, payload, traceparent, request_id, created_at, n);
