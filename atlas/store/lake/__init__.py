"""The lake on an object store: step outputs, states of trainings, imported SAEs and releases behind one URL.

Nothing here is imported unless ``ATLAS_LAKE_URL`` is set; without it they are folders of ``ATLAS_HOME``.
"""
