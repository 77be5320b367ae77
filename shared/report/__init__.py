"""The audit report: what ledgers prove of a run, on one page that holds everything it shows."""
