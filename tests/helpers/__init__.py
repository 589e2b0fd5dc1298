"""What several files of tests use: small real things, not stand-ins for ours."""
