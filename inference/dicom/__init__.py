"""Read CT series in DICOM and write DICOM SEG; not imported for NIfTI input.

    discovery.py    find the series of a folder tree or zip; naming.py names them
    slices.py       a file's header -> Slice, one or many
    geometry.py     slices -> Stack, their order and affine
    pixels.py       the slices' pixels; compressed ones are decoded in processes
    series.py       Series, which the service reads as a `Volume`
    segmentation.py a label map -> DICOM SEG; headers.py corrects what it copies

SimpleITK's series reader was tried on phantoms: it read a series with a slice missing (4 mm became
5), with one twice, of mixed orientations and spacings, and with a tilted gantry as straight
volumes, and would add 264 MB. So `geometry.py` checks the positions.
"""
