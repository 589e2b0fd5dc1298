"""From a command line to one running job: composed settings, sweeps, signals, processes. No torch."""
