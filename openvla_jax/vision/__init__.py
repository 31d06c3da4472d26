"""What the model sees: host preprocessing and device augmentation."""
