"""`python -m walbd.cli` is the `walbd` command."""

from walbd.cli.walbd import main

main()
