"""What a file says of its tuning; `bitladder verify` reads it, also where there is no torch."""

TUNE_KEY = "bitladder.tune"
