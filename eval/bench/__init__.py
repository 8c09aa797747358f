"""Speed benchmarks: the CPU kernel against the machine's limits, and whole decode steps against stock ones."""
