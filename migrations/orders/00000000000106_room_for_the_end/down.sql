alter table orders set (fillfactor = 85);
