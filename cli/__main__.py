"""``python -m pyro_vje.cli``: the command where the script is not on the path."""

from pyro_vje.cli import main

main()
