"""What a job will cost, and which documents deserve one."""
