"""python -m bitladder."""

from bitladder.cli import main

main()
