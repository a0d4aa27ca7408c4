"""What only CUDA needs: the driver, and torch's runtime."""
