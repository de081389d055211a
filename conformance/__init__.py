"""Checks that take a base URL, so the same files run on ksync-server and on its peers."""
