-- That an order was accepted is its first event, and the order's own row holds all of it but its position among the events: the transaction
-- that wrote it, and a number of `order_event`'s own. With these two columns no row of `order_event` need be written (docs/adr/0012).
-- An order of the version before, which may still be running, has none here: its first event is in `order_event`.
alter table orders
    add column accepted_xid xid8,
    add column accepted_id bigint;
alter table orders
    alter column accepted_xid set statistics 10,
    alter column accepted_id set statistics 10;

-- Every change of an order's status, wherever it is kept: what streams read, by (xid, id). A row without a position is no event but an order of
-- the version before. That is for the reader to say: with a condition of its own an arm of the union is not read by its index's order.
create view order_change as
select xid, id, order_id, status, failure_reason, at from order_event
union all
select accepted_xid, accepted_id, id, 'New'::text, null::text, created_at from orders;
