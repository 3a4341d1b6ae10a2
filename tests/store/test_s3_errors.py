"""S3 errors are readable, and repeat no secret of the request."""

import traceback

import oracles
import pytest
from obstore.exceptions import BaseError

from sampimp.errors import StoreError
from sampimp.store.datasets import write_source
from sampimp.store.location import Folder
from sampimp.store.s3_errors import readable_errors

# The answer of AWS to a wrong secret key repeats the request, session token included.
REFUSAL = (
    "<Error><Code>SignatureDoesNotMatch</Code><Message>They differ.</Message>"
    "<CanonicalRequest>x-amz-security-token:token-of-the-tests</CanonicalRequest></Error>"
)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (403, REFUSAL, ("credentials that may", "SignatureDoesNotMatch: They differ.")),
        (400, "<Error><Code>ExpiredToken</Code></Error>", ("credentials that may", "Expired")),
        (404, "<Error><Code>NoSuchBucket</Code></Error>", ("an existing bucket", "create")),
        (301, "", ("the region of the bucket", "AWS_REGION")),
        (
            403,
            "<Error><Code>AccessDenied</Code><Message>For token-of-the-tests and "
            "secret-of-the-tests.</Message></Error>",
            ("credentials that may", "For (a credential) and (a credential)."),
        ),
        (405, "token-of-the-tests", ("a request that the server accepts", "status 405")),
    ],
)
def test_errors_quote_the_answer_without_its_secrets(bucket, monkeypatch, status, body, words):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-tests")
    bucket.answers = [(status, body)]
    folder = Folder.of("s3://bucket/study")
    source = oracles.make_source()
    uses = (Folder.check_reachable, Folder.check_writable, Folder.is_empty, Folder.remove)
    for use in (
        *uses,
        lambda folder: folder.create_bytes("x", b"1"),
        lambda folder: folder.read_json("x"),
        lambda folder: write_source(folder, source),  # through Zarr
    ):
        with pytest.raises(StoreError) as caught:
            use(folder)
        text = "".join(traceback.format_exception(caught.value))
        assert all(word in text for word in words), text
        assert "bucket" in caught.value.where
        for secret in ("token-of-the-tests", "secret-of-the-tests"):
            assert secret not in text


def test_a_full_disk_is_named():
    words = r"Expected free space(.|\n)*No space left on device(.|\n)*Where /data"
    with pytest.raises(StoreError, match=words), readable_errors("/data"):
        raise BaseError("Generic LocalFileSystem error: No space left on device (os error 28)")
