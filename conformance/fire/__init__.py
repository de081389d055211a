"""The server under fire: killed, starved of disk and database, reloaded, all under a load that remembers."""
