alter table shopd_log.record
    alter column topic_id set statistics -1,
    alter column partition set statistics -1,
    alter column "offset" set statistics -1,
    alter column appended_at set statistics -1,
    alter column key set statistics -1,
    alter column value set statistics -1,
    alter column headers set statistics -1,
    alter column timestamp set statistics -1;
