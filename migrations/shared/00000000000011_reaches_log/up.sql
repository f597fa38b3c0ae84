-- Leases say who reaches the database. Who reaches it and has lost the log keeps nothing that a neighbour could go on with.

-- Whether this replica of a consumer reaches the log, and since when that is so. One of a version that does not say so keeps its share, and
-- nobody gives anything up for its sake.
alter table consumer_member
    add column reaches_log   boolean     not null default true,
    add column reaches_since timestamptz not null default 'infinity';

-- The relay in charge has rows, and has not reached the log for a while: another one that does may take the outbox within its lease.
alter table outbox_cursor add column cut_off boolean not null default false;
