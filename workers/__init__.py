"""Celery workers: thin tasks around the functions that also run in process."""
