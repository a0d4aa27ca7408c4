"""The harness that measures a segmentation container as the challenge's organisers do."""
