alter table orders drop column stamp;
