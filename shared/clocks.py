"""How far the clocks of a site and of its server may lie apart, and how the server says so.

A site signs the time of each request. The server keeps no list of what it has seen: a request that
somebody saw and sends again is good until its time is too old, and only until the site has
connected anew. A time ahead of the server's lengthens that by as much, 60 s on 300 s.
"""

from __future__ import annotations

AHEAD_SECONDS = 60
BEHIND_SECONDS = 300
# The server's words for who is not let in, where the site can do something about it.
CLOCKS_DIFFER = "clocks-differ"
UNREGISTERED_KEY = "unregistered-key"
