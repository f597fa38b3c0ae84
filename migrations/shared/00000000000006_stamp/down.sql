drop function claim_stamped_keys(text[], text[], bigint[]);
alter table idempotency_key drop column stamp;
