"""An importance matrix in the terminal: tables, a heat map, a picture."""
