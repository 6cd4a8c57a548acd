"""Faults in real training runs, and what they cost."""
