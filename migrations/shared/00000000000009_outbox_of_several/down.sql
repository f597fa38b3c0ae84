-- What waits, as the version before knows it; nothing is written or published before it is committed.
lock table outbox in access exclusive mode;
create temporary table waiting on commit drop as
select m.* from outbox_message m join outbox o using (xid, id) where o.event_ids is not null order by m.xid, m.id, m.n;
drop view outbox_message;
delete from outbox where event_ids is not null;
alter table outbox
    drop column event_ids,
    drop column keys,
    drop column payloads,
    drop column traceparents,
    drop column request_ids,
    drop column created_ats;
insert into outbox (event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at)
select event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at from waiting order by xid, id, n;
alter table outbox_1 reset (toast_tuple_target);
alter table outbox_2 reset (toast_tuple_target);
alter table outbox_3 reset (toast_tuple_target);
alter table outbox_4 reset (toast_tuple_target);
