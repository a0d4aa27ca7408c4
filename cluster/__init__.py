"""A folder of CT volumes over a Ray cluster: the service of `inference`, once for every GPU.

`worker.py` is what runs beside each GPU, `runner.py` distributes the cases, `command.py` is the
command line.
"""
