"""Tells a Bento of ad2kit 0.1.0 what to do: its service imports modules that have moved since.

Later Bentos carry the package that they were made with, and need nothing of this one.
"""

raise ImportError(
    "this Bento was packaged by ad2kit 0.1.0, and its service does not run with a later version; "
    "package its run again: ad2kit package runs/NAME; or install the version that lies in the "
    "Bento: pip install env/python/wheels/*.whl"
)
