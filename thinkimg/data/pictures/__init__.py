"""Pictures of a data set: the places where they lie, their bytes, and prints by which they are found again.

row.make_row ──► image_files ──► places (files, archives), urls
survey       ──► prints
"""
