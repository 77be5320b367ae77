"""JSON Schemas of what the commands print and leave behind."""
