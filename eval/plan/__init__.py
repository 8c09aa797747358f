"""Measures the planner's constants, shows its predictions, and compares them with measurements."""
