"""Defenses of a model: inspection and repair."""
