"""The views of the app, one file each; every view is a function without arguments."""
