"""`python -m ksync_server.cli`."""

from ksync_server.cli import main

main(prog_name="ksync-server")
