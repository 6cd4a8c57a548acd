"""The same training runs by main.py and by timm's parts: `PYTHONPATH=.:tests python -m helpers.peer --help`."""
