"""Editing: statistics, targets, keys, methods, the journal and the sequential loop."""
