"""The command line; imports heavy packages only in the command that needs them."""
