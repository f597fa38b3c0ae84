drop table order_retry, sweep_cursor;
