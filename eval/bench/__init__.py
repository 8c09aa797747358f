"""Speed measurements: the CPU kernel beside the machine's own limits, and whole decode steps beside stock ones."""
