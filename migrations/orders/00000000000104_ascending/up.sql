-- The lists are read backwards now: new orders then go to the end of the index, where a page is filled before the next is begun. In the
-- descending ones they went before the first entry, and every page that was split stayed half full.
-- The new ones first: while they are made orders can be read, though not placed.
create index orders_by_user_ascending on orders (user_id, created_at, id);
create index orders_by_time_ascending on orders (created_at, id);
drop index orders_by_user;
drop index orders_by_time;
alter index orders_by_user_ascending rename to orders_by_user;
alter index orders_by_time_ascending rename to orders_by_time;
