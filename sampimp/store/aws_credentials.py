"""Credentials for S3: the AWS_* variables, a profile's keys, or a profile's sign-in by boto3.

obstore reads the AWS_* variables and queries the metadata service of an AWS machine; it does not
read the files in ~/.aws. `find_credentials` adds these files. The order of precedence:

1. AWS_ACCESS_KEY_ID and the other variables that obstore reads itself,
2. keys that the profile states (`KeyProfile`),
3. single sign-on, an assumed role or a `credential_process` of the profile (`SignInProfile`), by
   obstore's provider for boto3, where boto3 is installed,
4. the metadata service of an EC2 machine, which obstore queries itself.

A provider holds the profile's name and its files, never a secret: obstore calls it whenever it
needs credentials, so that they can be renewed while a study runs, and a pickled store
contains no secret: the process that unpickles it signs in again.

Map: `AwsProfile` (name, files and settings of a profile), `KeyProfile` and `SignInProfile` (the two
credential providers), `find_credentials` (the choice).
"""

import configparser
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from sampimp.errors import StoreError, keep_secret, require_package

if TYPE_CHECKING:
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Credential

_OBSTORE_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_SKIP_SIGNATURE",
)
_KEYS = {"aws_access_key_id", "aws_secret_access_key"}
_SIGN_IN_SETTINGS = {
    *("sso_session", "sso_start_url", "login_session"),
    *("role_arn", "credential_process"),
}
_KEY_LIFETIME = timedelta(minutes=15)
"""How long keys are used before the file is read again (arbitrary)."""
_SIGN_IN_LIFETIME = timedelta(minutes=10)
"""How long credentials of botocore are used before botocore is called again. It renews them when
less than 10 minutes are left (`RefreshableCredentials`), so that they never expire in use."""


def first_set(*names: str) -> str:
    """Return the value of the first environment variable that is set and not empty, or ''."""
    return next((value for name in names if (value := os.environ.get(name))), "")


@dataclass(frozen=True)
class AwsProfile:
    """A profile of the AWS files: its name, and the two files that are read for it.

    Parameters
    ----------
    name
        As in AWS_PROFILE.
    files
        Paths of the config file and of the credentials file.
    """

    name: str
    files: tuple[str, str]

    @classmethod
    def from_environment(cls) -> "AwsProfile":
        """Return the profile that the environment names, or the default one."""
        names = ("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")
        config, credentials = (
            str(Path(os.environ.get(name) or f"~/.aws/{file}").expanduser()) for name, file in names
        )
        return cls(first_set("AWS_PROFILE") or "default", (config, credentials))

    def read(self) -> dict[str, str]:
        """Return the profile's settings; the credentials file takes precedence."""
        settings: dict[str, str] = {}
        for file in self.files:
            parser = configparser.RawConfigParser()
            try:
                parser.read(file)
            except configparser.Error:
                continue  # the error's text may quote a secret; the file counts as empty
            for section in (f"profile {self.name}", self.name):
                if parser.has_section(section):
                    settings |= dict(parser[section])
        return settings


@dataclass(frozen=True)
class KeyProfile:
    """Credential provider of obstore for a profile that states its keys."""

    profile: AwsProfile

    def __call__(self) -> "S3Credential":
        """Read the keys from the file."""
        settings = self.profile.read()
        return _noted(
            {
                "access_key_id": settings["aws_access_key_id"],
                "secret_access_key": settings["aws_secret_access_key"],
                "token": settings.get("aws_session_token"),
                "expires_at": datetime.now(UTC) + _KEY_LIFETIME,
            }
        )


@dataclass(frozen=True)
class SignInProfile:
    """Credential provider of obstore for a profile with single sign-on, a role or a process.

    The provider of boto3 holds secrets and cannot be pickled. It is kept in a cache of this process
    (`_boto3_provider`), so that an unpickled store makes its own.
    """

    profile: AwsProfile

    def __call__(self) -> "S3Credential":
        """Return botocore's credentials, renewed where they are about to expire.

        Raises
        ------
        MissingPackageError
            boto3 is not installed.
        StoreError
            The sign-in has expired, the role is refused, or the process fails.
        """
        require_package("boto3", "cluster")
        try:
            credential = _boto3_provider(self.profile)()
        except Exception as error:  # from botocore, maybe with output of a credential_process
            line = str(error).partition("\n")[0] or type(error).__name__
            raise StoreError(
                expected=f"credentials of the AWS profile {self.profile.name!r}",
                got=line,
                where=" and ".join(self.profile.files),
                todo=f"for single sign-on: aws sso login --profile {self.profile.name}; otherwise "
                f"check the profile with: aws sts get-caller-identity --profile "
                f"{self.profile.name}",
            ) from None
        return _noted(credential)


def _noted(credential: "S3Credential") -> "S3Credential":
    """Return a credential that no message will repeat."""
    keep_secret(credential["secret_access_key"], credential.get("token"))
    return credential


@functools.lru_cache(maxsize=16)
def _boto3_provider(profile: AwsProfile) -> "Boto3CredentialProvider":
    """Return obstore's provider for a botocore session with this profile and its files."""
    import botocore.session
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = botocore.session.Session(profile=profile.name)
    for variable, file in zip(("config_file", "credentials_file"), profile.files, strict=True):
        session.set_config_variable(variable, file)
    return Boto3CredentialProvider(session, ttl=_SIGN_IN_LIFETIME)


def find_credentials(
    url: str, profile: AwsProfile, settings: Mapping[str, str]
) -> KeyProfile | SignInProfile | None:
    """Return the credential provider for a bucket, or None if obstore finds credentials itself.

    Signs in now, so that an expired sign-in is reported when the bucket is opened.
    The metadata service answers on AWS only, and elsewhere a request to it hangs for minutes. So
    obstore may query it only if the machine's firmware names Amazon EC2 as its vendor.

    Parameters
    ----------
    url
        The bucket's URL, for the message.
    profile, settings
        The profile, and the result of `AwsProfile.read`.

    Raises
    ------
    MissingPackageError
        The profile needs boto3, which is not installed.
    StoreError
        There are no credentials, or the profile's sign-in fails.
    """
    if first_set(*_OBSTORE_VARIABLES):
        return None
    if settings.keys() >= _KEYS:
        return KeyProfile(profile)
    if _SIGN_IN_SETTINGS & settings.keys():
        provider = SignInProfile(profile)
        provider()
        return provider
    vendor = Path("/sys/class/dmi/id/sys_vendor")
    if vendor.is_file() and vendor.read_text().startswith("Amazon EC2"):
        return None
    raise StoreError(
        expected="credentials for an s3:// URL",
        got=f"none in the environment, none for profile {profile.name!r} in "
        + " or ".join(profile.files),
        where=url,
        todo="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or set AWS_PROFILE to a profile of "
        "these files that has keys, single sign-on, a role or a credential_process",
    )
