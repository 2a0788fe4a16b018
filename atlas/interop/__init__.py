"""Other people's SAE files, in and out: one module per format, one registry, the hub, the library."""
