drop table order_event;
drop table orders;
