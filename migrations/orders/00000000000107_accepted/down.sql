-- What was written meanwhile, as the version before knows it; nothing is accepted before it is committed.
lock table orders, order_event in access exclusive mode;
insert into order_event (xid, id, order_id, status, at, traceparent) overriding system value
select accepted_xid, accepted_id, id, 'New', created_at, traceparent from orders where accepted_xid is not null
    on conflict do nothing;
drop view order_change;
alter table orders
    drop column accepted_xid,
    drop column accepted_id;
