"""The parts of scripts/make_coco.py: labels of YOLO and Pascal VOC, and what of them is written in COCO's format."""
