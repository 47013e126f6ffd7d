"""Defenses of an input: they score single images, or clean them before they are classified."""
