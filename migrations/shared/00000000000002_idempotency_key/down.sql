drop function claim_idempotency_keys(text[], text[], bigint[]);
drop table idempotency_key;
