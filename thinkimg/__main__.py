"""Command line for `python -m thinkimg`."""

from thinkimg.cli.main import main

main()
