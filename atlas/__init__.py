"""Head Atlas: what every attention head of a language model does, seen through sparse autoencoders.

The root imports nothing heavy, so that ``import atlas`` is free; ask for the room you need
(``atlas.pipeline``, ``atlas.store``, ...).
"""

__version__ = "0.1.0"
