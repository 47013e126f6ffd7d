"""Defenses that train a model another way."""
