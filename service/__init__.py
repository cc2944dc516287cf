"""The server, the command line and what surrounds them."""
