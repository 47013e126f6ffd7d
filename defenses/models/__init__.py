"""Defenses of a model: they inspect it or repair it."""
