"""`python -m flows.cli`: the same as `relex`."""

from flows.cli.main import main

main()
