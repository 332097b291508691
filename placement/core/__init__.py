"""The decisions: pure functions over immutable values. No Ray, no NVML, no clock, no I/O."""
