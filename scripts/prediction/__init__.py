"""The parts of scripts/predict.py: files of images, and what a segmenter says of them."""
