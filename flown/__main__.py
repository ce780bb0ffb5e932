"""`python -m flown` is the command `flown`."""

from flown.cli import main

main()
