"""Values of records as public data sets write them, read for the schemas.

schemas/* ──► values          claims of a schema, boxes, tagged answers
          ├──► conversations  turns with their roles, the question and the answer
          └──► grounding      objects that fill the places of a text
"""
