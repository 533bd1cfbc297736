"""Data sets: public ones and a user's own files, read, checked, split and turned into samples.

    settings (DataConfig) ──► source.open_source ──► sources/<data.source>
                                                          │ rows: RawRow or Refused
    stages/prepare ──► prepared.survey ◄──────────────────┘
                           │    └──► split (held-out groups, taken samples)
                           ▼
                       prepared.make_row_jobs ──► Prepared (a Sample and its images)

`image_files` reads the images that rows name, from allowed paths and hosts. `text_tables` is shared by JSONL and CSV.
"""
