drop table payment;
drop table transfer;
drop table account;
drop function history_is_immutable();
