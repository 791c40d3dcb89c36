"""What makes a quant better at the same bytes: smoothing before, rounding, and tuning after."""
