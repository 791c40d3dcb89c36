"""What a step down of a tensor's type costs in KLD: measured swaps, and a law through them."""
