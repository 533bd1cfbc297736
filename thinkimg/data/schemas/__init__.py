"""Schemas of public data sets, one file each: the columns to recognise one by, and the fields of a record.

    recognise.recognise ──► schemas/*: COLUMNS, fits(record)
    row.make_row        ──► schemas/*: convert(record) -> Fields

A module defines

    VERSION = 1             part of the fingerprint: raised with any change of `convert`
    TITLE = "…"             names of data sets that have it, for people
    COLUMNS = ({…}, {…})    sets of columns, dotted ones too: a record that has all of one set may be of this schema
    READS = {…}             top-level columns that `convert` reads, which are therefore not kept as the user's own
    def fits(record)        (optional) True where the values look like it, too
    JOIN = ("imageId", "id")  (optional) column of the questions, and that of a table of pictures that it names
    def convert(record)     the record's Fields; raises RowRefused for a record that is none of this schema
"""
