"""Our own speed: where the service's time goes, and against what.

Takes weights and synthetic volumes; runs the service, the paper's pipeline written plainly and the
network alone; gives their times, ratios and, where there is a GPU, every figure that needs one.
"""
