drop table dead_letter;
drop function advance_offsets(text, int[], bigint[], bigint[], bigint[], bigint);
drop table consumer_offset;
drop table outbox_cursor;
drop table outbox;
