"""``python -m atlas.live``: the child process that answers the app's live calls."""

from atlas.live.serve import main

if __name__ == "__main__":
    main()
