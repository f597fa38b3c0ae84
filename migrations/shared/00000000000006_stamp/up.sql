-- Names the client's request that the answer was made for over all the times that the gateway tried it: another try of it is answered
-- as it was, any other request under the key is told that it is a replay.
alter table idempotency_key add column stamp uuid;

-- As `claim_idempotency_keys`, and the stamps. That one stays for the version before this, which may still be running.
create function claim_stamped_keys(keys text[], scopes text[], locks bigint[])
returns table (n bigint, acquired boolean, body_hash bytea, status smallint, headers jsonb, body bytea, stamp uuid)
language plpgsql as $$
declare
    taken boolean[];
begin
    select array_agg(pg_try_advisory_xact_lock(l.lock) order by l.n) into taken from unnest(locks) with ordinality l(lock, n);
    return query
        select g.n, taken[g.n], i.body_hash, i.status, i.headers, i.body, i.stamp
          from unnest(keys, scopes) with ordinality g(key, scope, n)
          left join lateral (select k.body_hash, k.status, k.headers, k.body, k.stamp
                               from idempotency_key k where k.key = g.key and k.scope = g.scope limit 1) i on true;
end $$;
