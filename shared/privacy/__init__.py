"""Events, accounting and the ledger: what is released, what it costs, and the record of both."""
