"""Readable errors of S3 and of disks: every exception of obstore becomes a `StoreError`.

The body of an S3 error can repeat the request, session token included. So the message is composed
anew from the parts that are known to be harmless: HTTP status, S3's code and message, and the
server's address. `_ADVICE` maps these to what was expected and what to do; add a row there for an
S3 error that needs specific advice.

Map: `readable_errors` (the context manager around every call of obstore), `ServerAwayError`
(`Folder` repeats the request after it).
"""

import contextlib
import re
from collections.abc import Iterator

from obstore.exceptions import AlreadyExistsError, BaseError

from sampimp.errors import StoreError, UserError


class ServerAwayError(StoreError):
    """A bucket's server does not answer, or answers only with server errors (status 5xx)."""


@contextlib.contextmanager
def readable_errors(where: object) -> Iterator[None]:
    """Turn exceptions of obstore into StoreErrors; absent and existing files pass.

    Parameters
    ----------
    where
        The folder or object, for the message.

    Raises
    ------
    ServerAwayError
        The bucket's server does not answer.
    StoreError
        The bucket does not exist, or it refuses the credentials or the request; or a disk refuses
        the operation.
    """
    try:
        yield
    except UserError:
        raise
    except (BaseError, OSError) as error:
        is_answer = isinstance(error, FileNotFoundError | FileExistsError | AlreadyExistsError)
        if is_answer and "<Code>NoSuchBucket" not in str(error):
            raise
        # `from None`: the text of `error` may repeat the request's session token.
        raise _make_store_error(str(error), str(where)) from None


_ADVICE = (
    # pattern in "status code redirect", expected, to do; the first match counts
    (
        "NoSuchBucket",
        "an existing bucket",
        "create the bucket, or correct its name; AWS_ENDPOINT_URL sets the server",
    ),
    (
        "LOCATION|PermanentRedirect|AuthorizationHeaderMalformed",
        "the region of the bucket",
        "set AWS_REGION to the bucket's region",
    ),
    (
        "401|403|Token",
        "credentials that may list, read, write and delete in the bucket",
        "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile in "
        "~/.aws, and their permissions",
    ),
    (
        "[34]\\d\\d",
        "a request that the server accepts",
        "check that AWS_ENDPOINT_URL is the address of an S3 server",
    ),
    (
        "",
        "a server that answers",
        "check the network, and AWS_ENDPOINT_URL if the bucket is not on AWS; then run the same "
        "command again",
    ),
)


def _make_store_error(text: str, where: str) -> StoreError:
    """Compose a StoreError from the text of an obstore exception."""
    if "External AWS credential provider" in text:
        return _make_credential_error(text, where)
    line = text.split("\n")[0]
    if "No space left" in line:
        return StoreError(
            expected="free space",
            got=line,
            where=where,
            todo="free some, or enlarge the disk, then run the same command again",
        )
    if not re.search("Error performing|HTTP error", line):  # a disk, or no request was sent
        return StoreError(
            expected="a folder or bucket that can be read and written",
            got=line or "an error without a text",
            where=where,
            todo="check the path, its permissions and the free space, or the AWS_* variables",
        )
    status = _search(r"(?<=status code: )\d{3}", text)
    code = _search(r"(?<=<Code>)\w+", text)
    redirect = _search("redirect without LOCATION", text)
    if code:
        got = f"{code}: {_search(r'(?<=<Message>)[^<]+', text)}"
    elif status or redirect:
        got = f"status {status}" if status else redirect
    elif "kind: Timeout" in text:
        got = "no answer in time"
    else:  # no answer: the whole text comes from this client
        reasons = re.findall(r'(?:message|error): "([^"]+)"', text)
        got = (reasons or [line.rpartition(" - ")[2]])[-1]
    facts = f"{status} {code} {redirect}"
    expected, todo = next(
        (expected, todo) for pattern, expected, todo in _ADVICE if re.search(pattern, facts)
    )
    kind = ServerAwayError if expected == _ADVICE[-1][1] else StoreError
    server = _search(r"https?://[^/\s?]+", text) or "the server"
    return kind(expected, f"{got} (from {server})", where, todo)


def _make_credential_error(text: str, where: str) -> StoreError:
    """Compose the error for credentials that could not be renewed while a study runs."""
    # Errors of `sampimp.store.aws_credentials` have harmless texts; for others, the type is kept.
    reason = _search(r"(?<= Got ).+", text) or _search(r"(?<=provider: )\w+", text)
    return StoreError(
        expected="credentials of the AWS profile",
        got=reason or "none",
        where=where,
        todo="renew them (for single sign-on: aws sso login --profile NAME), then run the same "
        "command again",
    )


def _search(pattern: str, text: str) -> str:
    """Return the first match, or an empty string."""
    match = re.search(pattern, text)
    return match[0] if match else ""
