"""Many runs: sweeps and suites as jobs in processes or on Ray."""
