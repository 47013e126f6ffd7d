"""Defenses of a received set: they score its rows or clean it."""
