"""Is it as good, how fast is it, may it ship: parity, latency, the report."""
