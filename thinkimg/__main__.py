"""`python -m thinkimg` is the command line."""

from thinkimg.cli.main import main

main()
