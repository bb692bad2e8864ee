"""`python -m distft`: the command line."""

from distft.cli import main

main()
