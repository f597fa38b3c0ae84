drop index orders_by_position;
