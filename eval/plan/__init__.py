"""The planner's constants measured, its predictions shown, and held against what was measured."""
