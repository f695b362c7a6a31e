"""Quantised weights in files: the table of formats, their arithmetic in NumPy, and the files that contain them."""
