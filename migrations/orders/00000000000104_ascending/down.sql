drop index orders_by_user;
drop index orders_by_time;
create index orders_by_user on orders (user_id, created_at desc, id desc);
create index orders_by_time on orders (created_at desc, id desc);
