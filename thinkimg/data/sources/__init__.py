"""Data sources: one file per source, named like the value of `data.source`.

Such a file defines `class Settings(RowsConfig)`, with the settings that only this source has, and `open_source`, which
returns a `source.Source`. The rows come lazily and in order, in as many passes as needed. An image is read when its
reader is called, so that memory holds the images in work. A row that cannot be used is replaced by a Refused.

    data ──► Settings          prepare ──► source.open_source ──► rows ──► prepared.survey ──► samples, images

The samples of `puzzles` are made by thinkimg/puzzles, above this package. A user's own is such a module elsewhere:
`data.source: my_project.sources.mine`, or an entry point of the group `thinkimg.sources`.
"""
