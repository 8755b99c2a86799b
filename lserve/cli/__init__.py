"""The `lserve` command. Each subcommand has a module here; `main.py` knows them all."""
