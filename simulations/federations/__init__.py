"""Real federations on this machine: one server and many client processes over TLS on loopback."""
