drop table consumer_member;
