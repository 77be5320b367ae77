"""The auditor's service as protocol buffers; what is generated from audit.proto lies beside it."""
