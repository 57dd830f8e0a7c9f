"""What a store raises."""


class StoreError(ValueError):
    """A store that cannot be read or written as asked; the message names the object."""


class CorruptObject(StoreError):
    """An object whose bytes are not those that were written."""


class MissingObject(StoreError):
    """An object that a root or a row names and that is not there: lost, or collected since that root was read."""
