-- Ends a statement that moved fewer accounts than it was to: one of them has moved since it was seen. Nobody would look at a row count before
-- the commit, because the statement is all of its transaction.
create function expect_unchanged(moved bigint, expected int) returns void language plpgsql as $$
begin
    if moved <> expected then
        raise exception 'could not serialize: % of % accounts stand as they were seen', moved, expected
            using errcode = 'serialization_failure';
    end if;
end $$;
