"""Defenses of a received set: scores of its rows, and cleaner sets."""
