"""Reading texts ahead into a prefix store, and answering questions about them from there."""
