"""The server's only touch of Flower's internals (1.41): its SuperLink application, hosted here."""
