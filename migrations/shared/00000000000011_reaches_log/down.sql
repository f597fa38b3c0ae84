alter table outbox_cursor drop column cut_off;
alter table consumer_member drop column reaches_since, drop column reaches_log;
