"""Training of the attention U-Net; nothing in the container imports this package."""
