-- As in shared/00000000000008_statistics: what is looked for is sampled sparsely, the rest not at all.
alter table shopd_log.record
    alter column topic_id set statistics 10,
    alter column partition set statistics 10,
    alter column "offset" set statistics 10,
    alter column appended_at set statistics 10,
    alter column key set statistics 0,
    alter column value set statistics 0,
    alter column headers set statistics 0,
    alter column timestamp set statistics 0;
