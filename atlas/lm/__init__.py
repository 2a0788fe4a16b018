"""Language models: load one (bundled, local folder, hub), read and replace its activations."""
