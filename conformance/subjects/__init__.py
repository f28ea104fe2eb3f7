"""Adapters that ship with the kit: this project's own functions and the peers'."""
