"""The bench: measures defenses on a set and on its clean twin."""
