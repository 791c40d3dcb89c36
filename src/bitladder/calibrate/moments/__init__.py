"""Second moments of the inputs of weights: collected, merged, and the file that keeps them."""
