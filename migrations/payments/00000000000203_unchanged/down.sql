drop function expect_unchanged(bigint, int);
