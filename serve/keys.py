"""API keys, known by their SHA-256 alone.

A key's hash is one line of a file, or one of several in `DISTILL_API_KEY_HASHES` (separated by commas):
    head -c 24 /dev/urandom | base64 | tee key.txt | tr -d '\\n' | sha256sum | cut -c -64 >> hashes.txt
Several are valid at once, so that a new one can be handed out before the old one is struck off.
"""

import hashlib
import hmac
import os
import re
from pathlib import Path

from pipelines.errors import UserError

HASHES_ENV = "DISTILL_API_KEY_HASHES"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Keys:
    """The hashes of the keys that are valid."""

    def __init__(self, hashes: list[str]) -> None:
        self._hashes = hashes

    @classmethod
    def read(cls, file: str | None) -> "Keys":
        """Those of the file, where one is given, and of the environment. Empty lines and `#` comments are left out.

        Raises:
            UserError: the file is not there, or something in it or in the environment is no SHA-256.
        """
        given = [(HASHES_ENV, line) for line in os.environ.get(HASHES_ENV, "").split(",")]
        if file is not None:
            try:
                lines = Path(file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"keys file {file!r} can't be read: {error}") from error
            given += [(f"{file}, line {number}", line.partition("#")[0]) for number, line in enumerate(lines, 1)]
        hashes = [(where, text.strip().lower()) for where, text in given if text.strip()]
        for where, text in hashes:
            if not _SHA256.fullmatch(text):
                raise UserError(f"{where}: not a SHA-256 of 64 hexadecimal digits; keys are given by their hash alone")
        return cls([text for _, text in hashes])

    @classmethod
    def wanted(cls, file: str | None, required: bool) -> "Keys | None":
        """Those that a request must show one of; None: it need not.

        Raises:
            UserError: one is required and none is given, or `read` finds something wrong.
        """
        keys = cls.read(file)
        if required and not keys._hashes:
            raise UserError(
                f"an API key is required and none is given: put the SHA-256 of one into {HASHES_ENV} or a keys file, "
                "or ask for none (--no-key, require_key: false) where nobody else can reach the port"
            )
        return keys if required else None

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, key: str) -> str | None:
        """The first eight digits of the key's hash, by which logs call it; None when it is not valid. It takes as
        long whichever key is given."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        found = [hmac.compare_digest(digest, known) for known in self._hashes]
        return digest[:8] if any(found) else None
