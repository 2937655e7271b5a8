"""`python -m hjepa` is `hjepa`."""

from hjepa.cli import main

main()
