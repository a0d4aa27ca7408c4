"""What only CUDA needs: the driver, transfers, choices."""
