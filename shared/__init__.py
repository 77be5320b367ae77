"""What server and site must agree on: contract, privacy, models, data, wire, keys."""
