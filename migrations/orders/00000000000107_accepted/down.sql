-- What was written meanwhile, as the version before knows it.
insert into order_event (xid, id, order_id, status, at, traceparent) overriding system value
select accepted_xid, accepted_id, id, 'New', created_at, traceparent from orders where accepted_xid is not null;
drop view order_change;
alter table orders
    drop column accepted_xid,
    drop column accepted_id;
