"""What the tests of found faults share."""

import pytest

from fairseq_hash.core.errors import UserError

DEEP = "[" * 50_000


def refused(read, *arguments):
    """Return the one line with which a reading ends."""
    with pytest.raises(UserError) as caught:
        read(*arguments)
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 2000
    return message


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path
