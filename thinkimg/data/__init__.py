"""Data sets: public ones and a user's own files, recognised, read, checked, split and turned into samples.

settings (DataConfig) ──► source.open_source ──► sources/<data.source> ──► hub/ (where it is no local path)
                                                      │
tables/ ──► recognise ──► schemas/<name> ──► fields ──┤
                          texts/ (tidy) ──► row ◄─────┴── pictures/ (readers of images)
                                             │ RawRow or Refused
stages/prepare ──► survey/ (checks, split, draw, prints of pictures) ──► Sample
thinkimg data inspect | show ──► report/ (facts of tables and data sets, as lines and as a page)
"""
