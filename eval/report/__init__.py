"""The report of runs, sweeps and suites: a page, or tables."""
