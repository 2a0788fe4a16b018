"""The Celery application, for Celery's own tools: ``celery -A workers.app inspect active``."""

from atlas.queue import make_app
from atlas.settings import load_settings

app = make_app(load_settings(), include=("workers.tasks",))
