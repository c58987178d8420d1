"""effbench: one honest row per compressed language model."""
