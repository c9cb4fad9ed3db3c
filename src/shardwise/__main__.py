"""`python -m shardwise`: the `shardwise` command, where the script of that name is not in PATH."""

from .cli.main import main

main()
