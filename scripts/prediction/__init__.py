"""The parts of scripts/predict.py: files of images, and what segmenters and detectors say of them."""
