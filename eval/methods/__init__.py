"""Every method in one harness: equal work, score and speed from the same run."""
