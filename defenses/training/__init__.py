"""Defenses that train a model in another way."""
