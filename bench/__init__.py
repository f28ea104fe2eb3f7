"""Speed against peers: `python -m bench`."""
