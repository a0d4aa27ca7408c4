exec python3 broken.py "$DEFECT"
