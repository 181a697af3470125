"""What is rare and slow: faults, numerics over a million steps, fuzzing, installations, what a release uploads."""
