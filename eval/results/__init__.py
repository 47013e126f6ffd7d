"""Records, metrics and tables: what everything else in eval reads and writes."""
