"""`python -m thinkimg` is the command line."""

from thinkimg.cli import main

main()
