-- What was answered under a client's idempotency key, written in the transaction of its effect. `scope` is method and path.
-- Keys come first in the index: those made by time then go to its end, whatever path they are for.
create table idempotency_key (
    key        text        collate "C" not null,
    scope      text        collate "C" not null,
    body_hash  bytea       not null,
    status     smallint    not null,
    headers    jsonb       not null,
    body       bytea       not null,
    created_at timestamptz not null default clock_timestamp(),
    primary key (key, scope)
);
create index idempotency_key_by_age on idempotency_key (created_at);

-- Locks the keys until the transaction ends, never waiting, and reads what is stored under them. Two statements, so that the
-- second sees whatever the keys' last holders committed: their locks were released after that.
create function claim_idempotency_keys(keys text[], scopes text[], locks bigint[])
returns table (n bigint, acquired boolean, body_hash bytea, status smallint, headers jsonb, body bytea) language plpgsql as $$
declare
    taken boolean[];
begin
    select array_agg(pg_try_advisory_xact_lock(l.lock) order by l.n) into taken from unnest(locks) with ordinality l(lock, n);
    -- Lateral and limited: key by key through the index, whatever the planner last saw.
    return query
        select g.n, taken[g.n], i.body_hash, i.status, i.headers, i.body
          from unnest(keys, scopes) with ordinality g(key, scope, n)
          left join lateral (select k.body_hash, k.status, k.headers, k.body
                               from idempotency_key k where k.key = g.key and k.scope = g.scope limit 1) i on true;
end $$;
