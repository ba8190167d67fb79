"""The native engine as a server: the token wire, and what its weights need."""
