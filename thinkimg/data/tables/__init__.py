"""Readers of tables, one file per format: what a file is decides which of them reads it.

find.find_tables ──► parquet, json_lines, json_array, delimited, pairs ──► table.Table
"""
