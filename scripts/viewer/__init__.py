"""The parts of scripts/visualize.py: what a page holds, the page, the server that adds to it, and figures."""
