"""What somebody who runs the service looks at: health and metrics, over HTTP and on the command line."""
