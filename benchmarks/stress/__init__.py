"""What is rare and slow: faults, numerics over a million steps, fuzzing, every way to install, what a release uploads."""
