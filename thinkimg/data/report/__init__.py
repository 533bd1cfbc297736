"""Reports on data sets for people: of tables before they are prepared, and of prepared ones.

thinkimg data inspect ──► inspect ──► table_report, overrides (settings that reproduce it), alike (shards)
thinkimg data show, prepare ──► summary
both ──► example ──► lines (for a terminal), sheet (a page of HTML)
"""
