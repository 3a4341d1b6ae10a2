"""Text of the page without the paths of the machine that wrote it.

A page is published and passed on; a path in it would tell of a machine that its readers do not
have. So the last part of a path stands for all of it.

Map: `hide_paths` (of any text), `anchor` (the id of a section).
"""

import re

_PATH = re.compile(
    r"""(?:file://|(?<![\w./<>)\]}-]))   # no word, relative path, URL or tag before it
        (?:/[\w.@~+-]+)+/?               # of POSIX
      | \b[A-Za-z]:\\[^\s"'<>|]+         # of Windows""",
    re.VERBOSE,
)


def hide_paths(text: str) -> str:
    r"""Return a text in which the last part of each absolute path stands for the path.

    Examples
    --------
    >>> hide_paths("folder:/home/me/cifar10, 3/4 of s3://bucket/a and /tmp/x/"), hide_paths("a/b")
    ('folder:cifar10, 3/4 of s3://bucket/a and x', 'a/b')
    >>> hide_paths(r"C:\data\mnist")
    'mnist'
    """
    return _PATH.sub(lambda path: re.split(r"[/\\]", path.group().rstrip("/\\"))[-1], text)


def anchor(name: str) -> str:
    """Return the HTML id of a section.

    Examples
    --------
    >>> anchor("mnist/cnn")
    'data-mnist-cnn'
    """
    return "data-" + "".join(letter if letter.isalnum() else "-" for letter in name)
