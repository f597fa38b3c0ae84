-- Names the client's request that placed the order over all the times that the gateway tried it, where no key of the client's does.
-- Another try is told from a replay by it; it is read with the order and never looked up.
alter table orders add column stamp uuid;
