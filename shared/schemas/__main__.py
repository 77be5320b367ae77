"""Writes the JSON Schemas anew: `python -m bract.shared.schemas`, after a report has changed."""

from __future__ import annotations

import json
from pathlib import Path

from bract.shared.reports import REPORTS, schema

for name in REPORTS:
    path = Path(__file__).with_name(f"{name}.schema.json")
    path.write_text(json.dumps(schema(name), indent=2, ensure_ascii=False) + "\n")
