"""`python -m vestige` is the command line."""

from vestige.cli.main import main

main()
