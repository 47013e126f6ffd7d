"""Defenses of an input: scores of single images, and images cleaned before they are classified."""
