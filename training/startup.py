"""What a program does before its other imports."""
from . import missing, threads

threads.limit_spinning()
missing.report_missing_packages()
