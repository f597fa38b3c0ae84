-- None of the orders that are there is in it: it costs one reading of the table, while which orders can be read, though not placed or ended. By
-- itself, so that the stronger lock of a new column is not held for so long.
create index orders_by_position on orders (accepted_xid, accepted_id) where accepted_xid is not null;
