"""An object that shows whether a loader unpickles."""

LOADED = []


def explode():
    LOADED.append(1)


class Bomb:
    """Leaves a trace in LOADED if it is unpickled."""

    def __reduce__(self):
        return explode, ()
