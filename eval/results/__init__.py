"""Records, metrics, statistics and tables: the ground floor of ``eval``."""
