"""Networks as files for other runtimes, for scripts/export.py and scripts/predict.py."""
