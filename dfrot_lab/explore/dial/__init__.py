"""One token on a dial from no rotation to a whole one."""
