"""Image classification, with mixup, distillation and token labels."""
