-- Takes away: nothing that the version before this does: its letters are all `dead`, which the new check and indexes leave alone.
--
-- Records that decode but keep failing are parked, and their key's later records wait behind them.
alter table dead_letter
    -- dead: cannot be decoded. parked: the head of its key's queue. waiting: behind a head. resolved: it was dead and was applied
    -- after all; only its position is kept, because it came after what was behind it.
    add column state           text        not null default 'dead' check (state in ('dead', 'parked', 'waiting', 'resolved')),
    add column undecodable     boolean     not null default true,
    -- Whose order is kept, and what a repeat is known by; of what could be decoded.
    add column ordering_key    text,
    add column business_key    text,
    -- Of a head: how many wait behind it.
    add column followers       int         not null default 0,
    add column published_at    timestamptz,
    add column received_at     timestamptz,
    -- What an operator asked the partition's owner for.
    add column requested       text        check (requested in ('redrive', 'discard')),
    -- Of a head: when its owner tries it again by itself.
    add column next_attempt_at timestamptz,
    add constraint dead_letter_keys
        check (state not in ('parked', 'waiting') or (ordering_key is not null and business_key is not null));

create unique index dead_letter_head on dead_letter (topic, partition, ordering_key) where state = 'parked';
-- A repeat of what waits is not kept twice.
create unique index dead_letter_queue on dead_letter (topic, partition, ordering_key, business_key)
    where state in ('parked', 'waiting');
create index dead_letter_follower on dead_letter (topic, partition, ordering_key, log_offset) where state = 'waiting';
create index dead_letter_due on dead_letter (topic, partition) where requested is not null or next_attempt_at is not null;
-- By hash: another producer's key may be longer than a page.
create index dead_letter_by_key on dead_letter using hash (key);

-- A dead letter's copy goes out as it came: a key of any bytes or none, headers of its own, perhaps no value.
alter table outbox
    alter column payload drop not null,
    add column raw_key bytea,
    add column headers jsonb;
