delete from outbox where headers is not null;
alter table outbox drop column headers, drop column raw_key, alter column payload set not null;
delete from dead_letter where state = 'resolved';
drop index dead_letter_by_key, dead_letter_due, dead_letter_follower, dead_letter_queue, dead_letter_head;
alter table dead_letter
    drop column state, drop column undecodable, drop column ordering_key, drop column business_key, drop column followers,
    drop column published_at, drop column received_at, drop column requested, drop column next_attempt_at;
