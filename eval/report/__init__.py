"""One page of everything that was measured, for a browser without a network."""
