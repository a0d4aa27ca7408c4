"""DICOM series in, DICOM segmentations out; nothing of it is imported for NIfTI input.

discovery.py    a folder tree or zip -> Series, named without the patient
slices.py       headers of files of one or many slices -> Slice
geometry.py     slices -> Stack: order and affine, or the reason why they make none
pixels.py       the slices' pixels, several files at once, compressed ones in processes
series.py       Series: what the service reads; gives the `Volume` of `read_volume`
segmentation.py label map -> DICOM SEG
"""
