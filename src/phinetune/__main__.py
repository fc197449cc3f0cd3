"""`python -m phinetune`: the command line."""

from phinetune.cli.app import main

main()
