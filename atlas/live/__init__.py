"""Live calls: the app asks for a number that no table holds, and torch answers within seconds.

``calls`` names what can be asked; ``client`` asks, without torch; ``serve`` answers, in a child process of
the app (``python -m atlas.live``) or, where a broker is set, in a worker of the queue ``interactive``.
"""
