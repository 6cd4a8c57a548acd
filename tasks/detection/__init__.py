"""Object detection and instance segmentation with Mask R-CNN, Cascade Mask R-CNN and RetinaNet."""
