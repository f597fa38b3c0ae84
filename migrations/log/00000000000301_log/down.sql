drop schema shopd_log cascade;
