"""Many runs: the jobs of sweeps and suites, in processes or on Ray."""
